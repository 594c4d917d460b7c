"""Compile a model to an artifact, or to plain C.

The model is a folder of transformers (config.json and safetensors) or an ONNX file. The artifact is a folder
that `tersor run`, `tersor bench` and `tersor.load` take; --export-c writes a folder of C for programs without
Python, on this machine or another.

    tersor compile ./all-MiniLM-L6-v2 -o minilm.tersor
    tersor compile model.onnx --target raspberry-pi-5 --recipe int8-dynamic --export-c out/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tersor.cli import options as shared
from tersor.cli.output import Steps, folder_bytes, human
from tersor.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="the artifact to write")
    parser.add_argument("--export-c", type=Path, metavar="OUT", help="the folder of C to write")
    parser.add_argument(
        "--name",
        default="model",
        metavar="NAME",
        help="what its symbols and files begin with (default: model)",
    )
    parser.add_argument(
        "--cc", metavar="COMMAND", help="a C compiler for the target (default: the machine's, or zig)"
    )
    shared.add_target(parser)
    shared.add_recipe(parser)
    shared.add_dynamic(parser)
    shared.add_threads(parser)
    parser.add_argument(
        "--input", type=Path, metavar="X.npz", help="example inputs by name; made if not given"
    )
    shared.add_calibration(parser)
    parser.add_argument(
        "--tune-minutes", type=float, default=0, metavar="M", help="search for better kernels for so long"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the model")
    parser.add_argument("--profile", action="store_true", help="time the layers, for the report")


def execute(options: argparse.Namespace) -> int:
    import tersor

    if options.output is None and options.export_c is None:
        raise InputError("nothing to write", fix="give -o FOLDER, --export-c FOLDER, or both")
    if options.export_c is not None:
        from tersor.codegen.export.writer import check_export

        check_export(tersor.targets.resolve(options.target), options.export_c, options.name, options.cc)
    example = shared.read_npz(options.input) if options.input else None
    dynamic = shared.dynamic_of(options, options.model, example)
    with Steps() as steps:
        compiled = tersor.compile(
            options.model,
            example,
            target=options.target,
            recipe=options.recipe,
            dynamic=dynamic,
            threads=options.threads,
            calibration=options.calibration,
            cache=options.cache,
            tune_minutes=options.tune_minutes,
            verify=not options.no_verify,
            profile=options.profile,
            output=options.output,
            progress=steps,
        )
        if options.export_c is not None:
            compiled.export_c(options.export_c, name=options.name, compiler=options.cc)
    print(compiled)
    for folder in filter(None, (options.output, options.export_c)):
        print(f"wrote {folder} ({human(folder_bytes(folder))})")
    return 0
