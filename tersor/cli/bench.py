"""Time an artifact, alone or beside other engines.

    tersor bench minilm.tersor --size length=128 --threads 1
    tersor bench minilm.tersor --against onnxruntime,openvino,torch --model ./all-MiniLM-L6-v2
    tersor bench model.tersor --against onnxruntime --model model.onnx

Engines run in processes of their own, bound to as many CPUs as threads, and take turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.cli import options as shared
from tersor.cli.output import LATENCY_COLUMNS, Steps, latencies, table
from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.codegen.runtime import CompiledFunction, CompiledModel


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="a folder written by `tersor compile`")
    parser.add_argument("--against", type=lambda text: text.split(","), default=[], metavar="ENGINE,...")
    parser.add_argument(
        "--model", type=Path, metavar="MODEL", help="what OUT was compiled from, for --against"
    )
    parser.add_argument(
        "--size",
        type=shared.sizes,
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="size of a dimension",
    )
    parser.add_argument("--input", type=Path, metavar="X.npz", help="time these inputs instead of made ones")
    parser.add_argument("--calls", type=int, metavar="N", help="how many calls to time")
    shared.add_function(parser)
    shared.add_threads(parser)


def execute(options: argparse.Namespace) -> int:
    import tersor

    check_engines(options)
    compiled = tersor.load(options.artifact, threads=options.threads)
    inputs = shared.read_npz(options.input) if options.input else None
    if options.against:
        return beside(compiled, inputs, options)
    function = shared.function(compiled, options.function)
    print(function.benchmark(inputs, dims=dict(options.size) or None, calls=options.calls))
    return 0


def check_engines(options: argparse.Namespace) -> None:
    """InputError for an unknown engine, or when there is nothing to give to the engines."""
    from tersor.frontends import is_onnx
    from tersor.peers import ENGINES, ON_FILES

    unknown = [name for name in options.against if name not in ENGINES]
    if unknown:
        raise InputError(f"unknown engine {', '.join(unknown)}", fix=f"choose from {', '.join(ENGINES)}")
    if options.against and options.model is None:
        raise InputError(
            "--against needs the model that the artifact was compiled from",
            why="an artifact holds compiled code, which other engines cannot read",
            fix="add --model FOLDER, or --model FILE.onnx",
        )
    if not options.against:
        return
    if is_onnx(options.model):
        if not options.model.is_file():
            raise InputError(f"there is no file {str(options.model)!r}")
        if unable := [name for name in options.against if name not in ON_FILES]:
            raise InputError(
                f"{', '.join(unable)} cannot read an ONNX file", fix=f"choose from {', '.join(ON_FILES)}"
            )
    elif not options.model.is_dir():
        raise InputError(
            f"{options.model} is not a folder", fix="give the model that the artifact was compiled from"
        )


def _comparable(compiled: CompiledModel) -> CompiledFunction:
    """The function that other engines can be compared on; InputError when there is none."""
    if compiled.main.signature.states:
        raise InputError(
            "a model that keeps state cannot be timed beside other engines",
            why="they would run the whole model of --model, without it",
            fix="leave out --against",
        )
    return compiled.main


def beside(compiled: CompiledModel, inputs: dict | None, options: argparse.Namespace) -> int:
    """Let the engines take turns with the artifact on the same inputs, and print what they did."""
    from contextlib import ExitStack

    from tersor.codegen.runtime.benchmark import make_inputs
    from tersor.frontends import is_onnx
    from tersor.peers import ENGINES, OURS, US, Folder, OnnxFile, Worker, race

    inputs = inputs or make_inputs(_comparable(compiled), dict(options.size))
    artifact = options.artifact.resolve()
    if is_onnx(options.model):
        source, reference = OnnxFile(options.model.resolve(), artifact), options.against[0]
    else:
        source, reference = Folder(options.model, tuple(inputs), artifact), "torch"
    engines = {US: OURS} | {name: ENGINES[name] for name in options.against}
    with ExitStack() as stack, Steps() as steps:
        steps(f"timing {', '.join(engines)} on {compiled.threads} thread{'s' * (compiled.threads > 1)}")
        workers = {
            name: stack.enter_context(Worker(engine, compiled.threads)) for name, engine in engines.items()
        }
        measurements = race(workers, source, inputs, reference=reference, calls=options.calls or 21)
    table(LATENCY_COLUMNS, latencies(measurements), right=LATENCY_COLUMNS[1:])
    return 0
