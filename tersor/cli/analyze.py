"""Show what each layer costs when it alone is quantized, and why.

    tersor analyze ./all-MiniLM-L6-v2 --calibration batches/
    tersor analyze model.onnx --calibration batches/ --json > layers.json

The most expensive layers come first. Columns of decibels are signal to noise of the layer's own result and of the
model's outputs, on data that is held out; more is better.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tersor.cli import options as shared
from tersor.cli.output import Steps


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="data as the model will see it: a folder of .npz files, one batch of inputs by name in each",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--only", action="append", metavar="GLOB", help="sites to look at; may be repeated (default: all)"
    )
    parser.add_argument(
        "--batches", type=int, default=4, metavar="N", help="held-out batches to compare on (default: 4)"
    )
    parser.add_argument("--no-latency", action="store_true", help="do not time the layers")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep statistics here")
    parser.add_argument("--input", type=Path, metavar="X.npz", help="example inputs by name, for --static")
    shared.add_target(parser)
    shared.add_dynamic(parser)


def execute(options: argparse.Namespace) -> int:
    import tersor

    example = shared.read_npz(options.input) if options.input else None
    with Steps() as steps:
        analysis = tersor.analyze(
            options.model,
            example,
            calibration=options.calibration,
            target=options.target,
            dynamic=shared.dynamic_of(options, options.model, example),
            only=options.only,
            batches=options.batches,
            latency=not options.no_latency,
            cache=options.cache,
            progress=steps,
        )
    print(json.dumps(analysis.to_json(), indent=1) if options.json else analysis)
    return 0
