"""Writes a program as an ONNX file, for other engines.

table        how exporters are entered and called
graph        the file's graph while it is written: names, constants, sizes
attention, elementwise, layout, reduction, nn, quantized    what each operation becomes
files        the model as a whole: tensors inside or beside it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.errors import InputError, UnsupportedOpError
from tersor.frontends.onnx.export import (  # noqa: F401  fill the table
    attention,
    elementwise,
    layout,
    nn,
    quantized,
    reduction,
    spatial,
)
from tersor.frontends.onnx.export.files import check_path, model_with_data, write_model
from tersor.frontends.onnx.export.graph import TYPE_CODES, Writer
from tersor.frontends.onnx.export.table import DEFAULT_OPSET, OPSETS, Export, exports, find_exporter
from tersor.ir import Function, Program, verify
from tersor.ir.decompose import decompose
from tersor.ir.verifier import describe

__all__ = ["Export", "exports", "to_onnx"]


def to_onnx(
    program: Program,
    path: str | Path | None = None,
    *,
    opset: int = DEFAULT_OPSET,
    external_data: bool | None = None,
    function: str | None = None,
) -> Any:
    """A program as an ONNX model; `tersor.capture` reads it back as the same program.

    Inputs, outputs, parameters and named dimensions keep their names (where an input and an output have the same, the
    output gets a number); sites, module paths and the ranges of
    dimensions are written down as metadata. A state becomes an input, and an output ``<name>.next`` that the next
    call is to be given.

    Args:
        path: of the file to write, which ends in .onnx; it appears complete or not at all.
        opset: of the standard operators, 18 to 23.
        external_data: whether tensors are written beside the model, to ``<file>.data``; None does so for models
            that are too large for one file (2 GB).
        function: which function of a program that has several; one file holds one.

    Returns:
        The ``onnx.ModelProto`` where no path is given, else None.

    Raises:
        UnsupportedOpError: operations without an exporter or a decomposition, all listed at once.
        InputError: an argument is unusable, the package onnx is missing, or the file cannot be written.
        ProgramError: the program breaks a rule.
    """
    if isinstance(opset, bool) or opset not in OPSETS:
        raise InputError(f"opset is {opset!r}", fix=f"give one from {OPSETS.start} to {OPSETS.stop - 1}")
    if path is None and external_data:
        raise InputError("external data needs a file to lie beside", fix="give a path, or external_data=None")
    target = None if path is None else check_path(path)
    verify(program)
    written = _function(program, function).copy(program.parameters.copy())
    decompose(written, lambda node: find_exporter(node.target.name, opset) is not None)
    _check_supported(written, opset)
    graph = _write(written, opset)
    if target is None:
        return model_with_data(graph)
    write_model(graph, target, external_data)
    return None


def _function(program: Program, name: str | None) -> Function:
    names = ", ".join(program.functions)
    if name is None and len(program.functions) == 1:
        return next(iter(program.functions.values()))
    if name is None:
        raise InputError(
            f"the program has several functions: {names}",
            why="an ONNX file holds one graph",
            fix='write one file for each: to_onnx(program, "encode.onnx", function="encode")',
        )
    if name not in program.functions:
        raise InputError(f"the program has no function called {name!r}", why=f"it has {names}")
    return program.functions[name]


def _check_supported(function: Function, opset: int) -> None:
    """Raises UnsupportedOpError naming every operation and dtype that ONNX has no counterpart for."""
    missing: dict[str, list[str]] = {}
    for node in function.nodes:
        if node.op == "output":
            continue
        if node.op == "call_function" and find_exporter(node.target.name, opset) is None:
            missing.setdefault(f"operation {node.target.name!r} has no exporter", []).append(describe(node))
        elif node.meta["value"].dtype not in TYPE_CODES:
            missing.setdefault(f"there is no type {node.meta['value'].dtype}", []).append(describe(node))
    if missing:
        lines = [f"  - {what}: {len(nodes)}x, first at {nodes[0]}" for what, nodes in missing.items()]
        raise UnsupportedOpError(
            f"the program cannot be written to ONNX opset {opset}:\n" + "\n".join(lines),
            fix="give each operation a decomposition (tersor.ir.register_op) or an exporter "
            "(tersor.frontends.onnx.export.exports)",
        )


def _write(function: Function, opset: int) -> Writer:
    writer = Writer(function, opset)
    for node in function.calls():
        exporter = find_exporter(node.target.name, opset)
        export = Export(writer, node)
        writer.names[node] = exporter(export)
        if export.overlooked:
            raise UnsupportedOpError(
                f"the exporter of operation {node.target.name!r} does not know {', '.join(export.overlooked)}",
                where=describe(node),
                fix="teach it (tersor.frontends.onnx.export), or take that out of the program",
            )
    return writer
