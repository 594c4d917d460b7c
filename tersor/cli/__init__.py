"""The command line: `tersor compile`, `tersor run`, `tersor bench`, ... (`tersor --help` lists them).

One module per command. A command imports what it needs when it runs, so that `tersor targets` does not wait
for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from tersor.cli import (
    analyze,
    bench,
    compile,
    demo,
    doctor,
    explain,
    export,
    inspect,
    passes,
    recipes,
    run,
    targets,
)
from tersor.errors import TersorError

COMMANDS = (compile, run, bench, export, explain, analyze, inspect, passes, recipes, targets, doctor, demo)
"""Modules with a docstring (the help text), `arguments(parser)` and `execute(options) -> exit code`."""

FAILED = 2
"""Exit code of an error that was explained; 1 is Python's own for a crash, and `doctor`'s for a finding."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="tersor",
        description="Makes trained Transformers small and fast, and compiles them to native code.",
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    commands = top.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        text = command.__doc__ or ""
        sub = commands.add_parser(
            name,
            help=text.strip().splitlines()[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show Python's traceback of an error")
        command.arguments(sub)
        sub.set_defaults(execute=command.execute)
    return top


def quieten() -> None:
    """Keep other libraries' progress bars and deprecations, which are for developers, off the terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 for an error that was explained on standard error."""
    top = parser()
    options = top.parse_args(arguments)
    if options.version:
        from tersor import __version__

        print(__version__)
        return 0
    if options.command is None:
        top.print_help()
        return 0
    if not options.debug:
        quieten()
    try:
        return options.execute(options)
    except TersorError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone: keep Python from flushing into the closed pipe.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
