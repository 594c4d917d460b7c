"""Captures an ONNX file; `export` writes one.

reader      the file as plain Python, with its damage as typed errors
dimensions  its inputs over named dimensions
convert     its graph as a program; `table` is how converters are entered and called, `values` evaluates sizes
elementwise, layout, reduction, nn, quantized, contrib    what each operator becomes
codes       weights that the file stores in 8 bits, back in their codes once the program is in canonical form
naming      names of weights that an exporter lost; `provenance` is where operators come from
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.ir import Program, Range, verify
from tersor.ir.canonicalize import canonicalize
from tersor.ir.canonicalize.indices import TableTooShort

log = logging.getLogger("tersor.capture")


def capture(
    model: str | Path | Any,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]] | None = None,
    *,
    name: str = "main",
    allow_nonfinite: bool = False,
) -> Program:
    """A program that computes what an ONNX model computes.

    Args:
        model: path of a file, or an ``onnx.ModelProto``; external data is read only from inside the file's folder.
        example_inputs: checked against the file's inputs; may be left out.
        dynamic: input name -> axis -> (dimension name, smallest size, largest size), for sizes that the file leaves
            open. Those not mentioned keep the file's name and range from 1 to 8 (a batch) or to 512,
            or as far as the model's tables of positions go.
        name: of the program's function.
        allow_nonfinite: accept NaN and infinity in stored tensors.

    Raises:
        InputError: the file is missing, damaged or of an unknown opset, or the arguments do not fit it.
        UnsupportedOpError: the model has operators without a converter; the message lists all of them.
        CaptureError: the model does something that a program cannot.
    """
    from tersor.frontends.onnx.codes import decode_rows, return_codes
    from tersor.frontends.onnx.convert import Conversion
    from tersor.frontends.onnx.dimensions import read_signature
    from tersor.frontends.onnx.reader import read_model

    read = read_model(model)
    limits: dict[str, Range] = {}
    while True:
        inputs, dims, assumed = read_signature(read, dynamic, example_inputs, limits)
        try:
            conversion = Conversion(read, inputs, dims, name, allow_nonfinite)
            program = conversion.run()
            notes = canonicalize(program)
            break
        except TableTooShort as error:
            before = limits.get(error.dim, dims.get(error.dim)) if error.dim in assumed else None
            after = error.fitting(before) if before else None
            if after in (None, before):
                raise
            limits[error.dim] = after  # nobody asked for the range that is too large
    decode_rows(program.main)
    notes += return_codes(program, list(conversion.encoded.values()))
    for note in notes:
        log.info(note)
    verify(program)
    return program
