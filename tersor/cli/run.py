"""Run an artifact, or an exported model on a device, on inputs from a file.

    tersor run minilm.tersor --input x.npz --output y.npz
    tersor run out/ --device adb --input x.npz --output y.npz

x.npz holds one array per input, by name (numpy.savez). Without --output only shapes and ranges are shown. A model
that keeps state starts from zeros.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tersor.cli import options as shared
from tersor.cli.output import Steps, table
from tersor.cli.stopping import cleaning_up
from tersor.errors import ArtifactError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="a folder written by `tersor compile`")
    parser.add_argument("--input", type=Path, required=True, metavar="X.npz", help="arrays by input name")
    parser.add_argument("--output", type=Path, metavar="Y.npz", help="where to write the outputs")
    shared.add_device(parser)
    shared.add_function(parser)
    shared.add_threads(parser)


def execute(options: argparse.Namespace) -> int:
    import tersor

    inputs = shared.read_npz(options.input)
    if shared.exported(options):
        with Steps() as steps, cleaning_up():
            steps(f"running on {options.device or 'local'}")
            model = tersor.load_on(options.artifact, options.device or "local", threads=options.threads or 1)
            outputs = model.run(options.function, **inputs)
    else:
        compiled = tersor.load(options.artifact, threads=options.threads)
        function = compiled.session().functions[shared.function(compiled, options.function).name]
        outputs = dict(flatten(function(**inputs)))
    rows = [
        (name, value.dtype, "x".join(map(str, value.shape)), f"{value.min():.6g}", f"{value.max():.6g}")
        for name, value in outputs.items()
    ]
    table(("output", "dtype", "shape", "smallest", "largest"), rows, right=("smallest", "largest"))
    if options.output:
        write_npz(options.output, outputs)
        print(f"wrote {options.output}")
    return 0


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name; the file appears complete or not at all. ArtifactError when that fails."""
    import numpy as np

    partial = path.with_name(f".{path.name}.part")
    try:
        with open(partial, "wb") as file:  # numpy adds .npz to names, not to files
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ArtifactError(
            "the outputs cannot be written",
            where=str(path),
            why=str(error),
            fix="give a file in a folder that exists, with room for it",
        ) from error


def flatten(outputs: Mapping[str, Any] | tuple, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, array) of nested outputs; names of nested ones are joined with dots."""
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in items:
        if isinstance(value, Mapping | tuple | list):
            yield from flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
