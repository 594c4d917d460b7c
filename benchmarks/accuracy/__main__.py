"""`python -m benchmarks.accuracy --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import benchmarks.accuracy
from benchmarks.accuracy import perplexity, similarity

KINDS = {"minilm": similarity, "smollm2": perplexity}


def main() -> None:
    """Runs the kind of benchmark that the command line names."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=benchmarks.accuracy.__doc__,
        formatter_class=formatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for name, module in KINDS.items():
        doc = module.__doc__ or ""
        kind = kinds.add_parser(name, help=doc.splitlines()[0], description=doc, formatter_class=formatter)
        module.arguments(kind)
        kind.add_argument("--calibration", type=Path, help="data to calibrate with, in the form of --data")
        kind.add_argument("--output", type=Path, metavar="FOLDER", help="write a report into this folder too")
        kind.set_defaults(execute=module.execute)
    options = parser.parse_args()
    options.command = ["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]
    options.execute(options)


if __name__ == "__main__":
    main()
