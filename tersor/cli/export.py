"""Write a model as an ONNX file for other engines, after the passes of a recipe.

tersor export ./all-MiniLM-L6-v2 -o minilm.onnx
tersor export model.onnx -o smaller.onnx --recipe int8 --calibration batches/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tersor.cli import options as shared
from tersor.cli.output import Steps, human


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.onnx", help="the file to write"
    )
    shared.add_recipe(parser)
    shared.add_calibration(parser)
    shared.add_dynamic(parser)
    parser.add_argument(
        "--input", type=Path, metavar="X.npz", help="example inputs by name; made if not given"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of the standard operators (default: 20)")
    parser.add_argument(
        "--external-data", action="store_true", help="write the tensors beside the file, to OUT.onnx.data"
    )


def execute(options: argparse.Namespace) -> int:
    import tersor
    from tersor.frontends.onnx.export.table import DEFAULT_OPSET
    from tersor.passes import Calibration, Context
    from tersor.passes.recipes import get

    pipeline = get(options.recipe)
    pipeline.check_data(options.calibration is not None)
    data = None if options.calibration is None else Calibration(options.calibration)
    example = shared.read_npz(options.input) if options.input else None
    with Steps() as steps:
        steps("capturing")
        program = tersor.capture(options.model, example, shared.dynamic_of(options, options.model, example))
        steps("running passes")
        program, _ = pipeline.run(program, Context(cache=options.cache), calibration=data)
        steps("writing")
        tersor.to_onnx(
            program,
            options.output,
            opset=options.opset or DEFAULT_OPSET,
            external_data=options.external_data or None,
        )
    written = [options.output, options.output.with_name(f"{options.output.name}.data")]
    size = sum(file.stat().st_size for file in written[: 1 + options.external_data])
    print(f"wrote {options.output} ({human(size)})")
    return 0
