"""Time an artifact, alone or beside other engines, or an exported model on devices.

    tersor bench minilm.tersor --size length=128 --threads 1
    tersor bench minilm.tersor --against onnxruntime,openvino,torch --model ./all-MiniLM-L6-v2
    tersor bench model.tersor --against onnxruntime --model model.onnx
    tersor bench out/ --device adb:SERIAL,ssh:pi@raspberrypi --threads 4

Engines run in processes of their own, bound to as many CPUs as threads, and take turns.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.cli import options as shared
from tersor.cli.output import LATENCY_COLUMNS, Steps, human, latencies, table
from tersor.cli.stopping import cleaning_up
from tersor.errors import DeviceError, InputError, TargetError

if TYPE_CHECKING:
    from tersor.codegen.runtime import CompiledFunction, CompiledModel
    from tersor.device import DeviceTimes


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="a folder written by `tersor compile`")
    shared.add_device(parser, several=True)
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
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="of an exported model: run nothing, show the least time that it can take on its target",
    )
    parser.add_argument(
        "--target", metavar="T", help="for --estimate: another target of the same architecture"
    )
    parser.add_argument(
        "--json", action="store_true", help="of an exported model: print JSON instead of a table"
    )


def execute(options: argparse.Namespace) -> int:
    import tersor

    if shared.exported(options):
        return estimated(options) if options.estimate else on_devices(options)
    if options.estimate:
        raise InputError("--estimate is for exported models", fix="tersor compile MODEL --export-c OUT")
    check_engines(options)
    compiled = tersor.load(options.artifact, threads=options.threads)
    inputs = shared.read_npz(options.input) if options.input else None
    if options.against:
        return beside(compiled, inputs, options)
    function = shared.function(compiled, options.function)
    print(function.benchmark(inputs, dims=dict(options.size) or None, calls=options.calls))
    return 0


def estimated(options: argparse.Namespace) -> int:
    """Show what an exported model's time is at the least."""
    import tersor

    if options.device or options.input:
        raise InputError("--estimate runs nothing", fix="leave out --device and --input; --size sets sizes")
    found = tersor.estimate(
        options.artifact,
        target=options.target,
        dims=dict(options.size),
        threads=options.threads or 1,
        function=options.function,
    )
    print(json.dumps({"estimate": asdict(found)}, indent=1) if options.json else found)
    return 0


def on_devices(options: argparse.Namespace) -> int:
    """Time an exported model on each device in turn; the exit code is that of a failure when one of them failed."""
    from tersor.codegen.export.folder import Exported
    from tersor.device import DeviceModel
    from tersor.targets.runners import connect

    if options.against:
        raise InputError("--against is for artifacts", fix="compile with -o OUT, and give that folder")
    exported = Exported.read(options.artifact)
    inputs = shared.read_npz(options.input) if options.input else None
    found, failed = [], []
    for device in connect(options.device or "local", exported.target):
        try:
            with Steps() as steps, cleaning_up():
                steps(f"timing on {device.name}")
                model = DeviceModel(exported, device, options.threads or 1)
                how = dict(calls=options.calls, function=options.function)
                found.append(model.benchmark(inputs, dims=dict(options.size) or None, **how))
        except (DeviceError, TargetError) as error:
            failed.append((device.name, error))
    if options.json:
        errors = [{"device": name, "error": str(error)} for name, error in failed]
        print(json.dumps([*map(asdict, found), *errors], indent=1))
    elif found:
        table(DEVICE_COLUMNS, map(device_row, found), right=DEVICE_COLUMNS[1:5])
        if any(times.emulated for times in found):
            print(
                "emulated: these times say nothing about a device; the results are those that it would give"
            )
    if failed:
        raise DeviceError("\n".join(str(error) for _, error in failed))
    return 0


DEVICE_COLUMNS = ("device", "median ms", "min ms", "threads", "resident", "of")


def device_row(times: DeviceTimes) -> tuple[str, ...]:
    """Times on one line; what an emulator says is marked."""
    sizes = ", ".join(f"{name} {size}" for name, size in times.sizes.items())
    memory = "" if times.memory is None or times.emulated else human(times.memory)
    return (
        f"{times.device} (emulated)" if times.emulated else times.device,
        f"{times.median:.4g}",
        f"{times.min:.4g}",
        str(times.threads),
        memory,
        f"{times.calls} call{'s' * (times.calls > 1)}" + (f", {sizes}" if sizes else ""),
    )


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
            raise InputError(f"there is no file {str(options.model)!r}", fix="give the path of an ONNX file")
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
