"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from tersor.codegen.runtime import CompiledFunction, CompiledModel

Axis = tuple[str, int, tuple[str, int, int]]
Dynamic = dict[str, dict[int, tuple[str, int, int]]]


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a local transformers folder, or an ONNX file"
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default="native", metavar="T", help="`tersor targets` lists them (default: native)"
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", default="fp32", metavar="R", help="`tersor recipes` lists them, or a TOML file"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="data for recipes that need some: a folder of .npz files, one batch of inputs by name in each",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep results of passes here, so that a killed run goes on"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of a call (default: one per core; for an exported model 1)",
    )


def add_function(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--function", metavar="NAME", help="which function to call (default: main, or the only one)"
    )


def add_device(parser: argparse.ArgumentParser, several: bool = False) -> None:
    parser.add_argument(
        "--device",
        metavar="D,..." if several else "D",
        help="where an exported model runs: local (the default), qemu[:CPU], adb[:SERIAL], ssh:[USER@]HOST[:PORT]",
    )


def exported(options: argparse.Namespace) -> bool:
    """Whether OUT is an exported model; InputError for --device and an artifact."""
    from tersor.codegen.export.folder import is_exported

    found = is_exported(options.artifact)
    if options.device and not found:
        raise InputError(
            f"{str(options.artifact)!r} is no exported model, which --device is for",
            fix="write one: tersor compile MODEL --target T --export-c OUT",
        )
    return found


def function(compiled: CompiledModel, name: str | None) -> CompiledFunction:
    """The function that --function names, or `main`; InputError when there is no such function."""
    if name is None and ("main" in compiled.functions or len(compiled.functions) == 1):
        return compiled.main
    if name not in compiled.functions:
        raise InputError(
            f"there is no function {name!r}" if name else "there is no function 'main'",
            fix=f"give --function {' or '.join(compiled.functions)}",
        )
    return compiled.functions[name]


def add_dynamic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dynamic",
        type=axis,
        action="append",
        default=[],
        metavar="INPUT:AXIS=NAME:MIN..MAX",
        help="let an axis of an input vary, e.g. input_ids:1=length:1..512; may be repeated "
        "(default: batch 1..8 and every length up to 512 that the model takes)",
    )
    parser.add_argument("--static", action="store_true", help="fix every size to that of the example inputs")


def axis(text: str) -> Axis:
    """`input_ids:1=length:1..512` -> ("input_ids", 1, ("length", 1, 512)); argparse reports what is wrong."""
    match = re.fullmatch(r"([^:=]+):(\d+)=([A-Za-z_]\w*):(\d+)\.\.(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not INPUT:AXIS=NAME:MIN..MAX, e.g. input_ids:1=length:1..512"
        )
    name, number, dimension, low, high = match.groups()
    if not 1 <= int(low) <= int(high):
        raise argparse.ArgumentTypeError(f"{text!r}: the sizes must satisfy 1 <= MIN <= MAX")
    return name, int(number), (dimension, int(low), int(high))


def dynamic(axes: Iterable[Axis], static: bool = False) -> Dynamic | str | None:
    """--dynamic and --static as `tersor.compile` takes them; "auto" without either.

    InputError for an axis given twice, or for axes together with --static.
    """
    collected: Dynamic = {}
    for name, number, dimension in axes:
        if number in collected.setdefault(name, {}):
            raise InputError(f"--dynamic names axis {number} of {name!r} twice", fix="give each axis once")
        collected[name][number] = dimension
    if static and collected:
        raise InputError("--dynamic and --static were both given", fix="give one of them")
    return None if static else collected or "auto"


def dynamic_of(
    options: argparse.Namespace, model: Path, example: Mapping[str, np.ndarray] | None = None
) -> Dynamic | str | None:
    """--dynamic and --static for this model and example inputs, as `tersor.capture` takes them.

    An ONNX file says which of its sizes vary, so --static names all of them. InputError when it lacks the sizes.
    """
    from tersor.frontends import is_onnx

    chosen = dynamic(options.dynamic, options.static)
    if chosen is not None or not is_onnx(model):
        return chosen
    if example is None:
        raise InputError(
            "--static needs the sizes",
            why="no example inputs are made up for ONNX files",
            fix="add --input X.npz, or give each size: --dynamic input_ids:1=length:128..128",
        )
    return {
        name: {axis: (f"size_{size}", size, size) for axis, size in enumerate(array.shape)}
        for name, array in example.items()
    }


def sizes(text: str) -> tuple[str, int]:
    """`length=128` -> ("length", 128)."""
    name, _, size = text.partition("=")
    if not name or not size.isdigit() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SIZE, e.g. length=128")
    return name, int(size)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. InputError when it cannot be read or is none."""
    import zipfile

    import numpy as np

    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds a single array without a name")
        with file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        fix = "write it with numpy.savez(path, input_ids=..., attention_mask=...)"
        raise InputError("the inputs cannot be read", where=str(path), why=str(error), fix=fix) from error
