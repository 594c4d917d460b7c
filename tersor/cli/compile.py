"""Compile a model to an artifact.

The model is a folder of transformers (config.json and safetensors) or an ONNX file. The artifact is a folder
that `tersor run`, `tersor bench` and `tersor.load` take.

    tersor compile ./all-MiniLM-L6-v2 -o minilm.tersor
    tersor compile model.onnx -o model.tersor
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tersor.cli import options as shared
from tersor.cli.output import Steps, folder_bytes, human


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the artifact to write"
    )
    shared.add_target(parser)
    shared.add_recipe(parser)
    shared.add_dynamic(parser)
    shared.add_threads(parser)
    parser.add_argument(
        "--input", type=Path, metavar="X.npz", help="example inputs by name; made if not given"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="data for recipes that need some: a folder of .npz files, one batch of inputs by name in each",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep results of passes here, so that a killed run goes on"
    )
    parser.add_argument(
        "--tune-minutes", type=float, default=0, metavar="M", help="search for better kernels for so long"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the model")


def execute(options: argparse.Namespace) -> int:
    import tersor

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
            output=options.output,
            progress=steps,
        )
    print(compiled)
    print(f"wrote {options.output} ({human(folder_bytes(options.output))})")
    return 0
