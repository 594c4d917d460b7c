"""Programs on disk: ``program.json`` (functions, no code) and ``parameters.safetensors``; never pickle.

Values are named by strings, dimensions written as text, everything else is plain JSON. Nothing in a file
names another file, and a loaded program has passed the verifier.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx

from tersor.errors import ProgramError
from tersor.folders import may_replace, new_folder
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim
from tersor.ir.parameters import Parameter, ParameterStore
from tersor.ir.program import PROVENANCE, Function, Program, Range, is_state
from tersor.ir.value import DTYPES, Value
from tersor.ir.verifier import verify

FORMAT = "tersor-program"
VERSION = 2
PROGRAM, PARAMETERS = "program.json", "parameters.safetensors"

# A program of a thousand layers takes some 20 MB.
_LARGEST_JSON = 256 << 20


def save_program(program: Program, folder: str | os.PathLike[str]) -> None:
    """Writes the program to a folder, which appears complete or not at all; a saved program there is
    replaced.

    Raises:
        ProgramError: an attribute is not plain data, something else is at that place, or the disk refuses.
    """
    folder = Path(folder)
    text = json.dumps(program_to_json(program), indent=1, allow_nan=False)
    try:
        if not may_replace(folder, PROGRAM):
            raise ProgramError(
                f"will not overwrite {str(folder)!r}",
                why="it is not a saved program",
                fix="choose another name",
            )
        with new_folder(folder) as temporary:
            (temporary / PROGRAM).write_text(text, encoding="utf-8")
            save_file(_tensors(program.parameters), temporary / PARAMETERS)
    except (OSError, SafetensorError) as error:
        raise ProgramError(
            f"cannot write {str(folder)!r}; nothing was left there",
            why=str(error),
            fix="check the place and the free space",
        ) from error


def load_program(folder: str | os.PathLike[str]) -> Program:
    """The program in a folder written by `save_program`; parameters are mapped, not read.

    Raises:
        ProgramError: there is none, it is damaged or malformed, or uses operations that are not installed.
    """
    folder = Path(folder)
    try:
        if (folder / PROGRAM).stat().st_size > _LARGEST_JSON:
            raise ProgramError("the file is larger than any program")
        data = json.loads((folder / PROGRAM).read_text(encoding="utf-8"), parse_constant=_no_constant)
        program = program_from_json(data, load_file(folder / PARAMETERS))
        verify(program)
        return program
    except FileNotFoundError as error:
        raise ProgramError(
            f"{str(folder)!r} is not a saved program", why=f"it has no {Path(error.filename or PARAMETERS).name}",
            fix="give a folder written by tersor.ir.save_program",
        ) from error  # fmt: skip
    except ProgramError as error:
        raise ProgramError(
            error.what, where=error.where or str(folder), why=error.why, fix=error.fix
        ) from error
    except Exception as error:  # a file may be wrong in any way; none may get past here as something else
        why = f"{type(error).__name__}: {error}"
        raise ProgramError(
            "this saved program is damaged", where=str(folder), why=why, fix="save it again"
        ) from error


# -- writing


def program_to_json(program: Program) -> dict[str, Any]:
    """Everything but the contents of parameters, as plain data.

    Raises:
        ProgramError: an attribute is not plain data.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "tied": program.parameters.tied(),
        "order": list(program.parameters),
        "states": {name: _value_to_json(value) for name, value in program.states.items()},
        "functions": [_function_to_json(f) for f in program.functions.values()],
    }


def _function_to_json(function: Function) -> dict[str, Any]:
    return {
        "name": function.name,
        "dims": {name: [r.min, r.max] for name, r in function.dims.items()},
        "example": dict(function.example),
        "nodes": [_node_to_json(node) for node in function.graph.nodes if node.op != "output"],
        "outputs": {name: node.name for name, node in zip(function.outputs, function.results, strict=True)},
        "updates": {name: node.name for name, node in function.updates.items()},
    }


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name}
    if is_state(node):
        data |= {"state": node.target}
    elif node.op == "placeholder":
        data |= {"input": node.target, "value": _value_to_json(node.meta["value"])}
    elif node.op == "get_attr":
        data |= {"parameter": node.target}
    else:
        data |= {"op": node.target.name, "operands": _to_json(node, node.args)}
        data |= {"attributes": {name: _to_json(node, a) for name, a in node.kwargs.items()}}
        data |= {"value": _value_to_json(node.meta["value"])}
    return data | {key: node.meta[key] for key in PROVENANCE if node.meta.get(key)}


def _value_to_json(value: Value) -> dict[str, Any]:
    return {"dtype": value.dtype, "shape": [str(d) if isinstance(d, Dim) else d for d in value.shape]}


def _to_json(node: fx.Node, argument: Any) -> Any:
    """Lists stand for tuples; what JSON has no form for is an object with one key that names its kind."""
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, list | tuple):
        return [_to_json(node, a) for a in argument]
    if isinstance(argument, Dim):
        return {"dim": str(argument)}
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or type(argument) in (bool, int, float, str):
        return argument
    raise ProgramError(
        f"cannot save an argument of %{node.name}: {argument!r}",
        why="arguments are numbers, strings, dimensions and tuples of them",
    )


def _tensors(parameters: ParameterStore) -> dict[str, torch.Tensor]:
    """Each tensor once, in memory of its own as the format asks."""
    tied = parameters.tied()
    return {
        name: p.tensor if p.tensor.untyped_storage().nbytes() == p.tensor.nbytes else p.tensor.clone()
        for name, p in parameters.items()
        if name not in tied
    }


# -- reading


def program_from_json(data: Any, tensors: Mapping[str, torch.Tensor]) -> Program:
    """The inverse of `program_to_json`, not verified yet; parameters tied to another may be missing in ``tensors``.

    Raises:
        ProgramError: the data is not a program, or uses operations that are not installed.
        ValueError, TypeError, KeyError, AttributeError, RecursionError: the data is damaged.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProgramError(f"{PROGRAM} is not a program of Tersor")
    if data["version"] != VERSION:
        raise ProgramError(
            f"the program has format version {data['version']!r}, this Tersor reads {VERSION}",
            fix="save it with this version again, or install the one that wrote it",
        )
    _check_ops_exist(data)
    states = {_typed(str, name): _value_from_json(value) for name, value in data["states"].items()}
    program = Program(_parameters(data, tensors), states)
    for item in data["functions"]:
        name = _typed(str, item["name"])
        dims = {dim: Range(*(_typed(int, limit) for limit in limits)) for dim, limits in item["dims"].items()}
        function = program.add_function(name, dims)
        function.example = {dim: _typed(int, size) for dim, size in item["example"].items()}
        _read_function(function, item)
    return program


def _check_ops_exist(data: Mapping[str, Any]) -> None:
    used = {node["op"] for function in data["functions"] for node in function["nodes"] if "op" in node}
    if unknown := sorted(name for name in used if _typed(str, name) not in ops):
        packages = sorted({name.partition(".")[0] for name in unknown if "." in name})
        raise ProgramError(
            f"the program uses operations that are not in the dialect: {', '.join(unknown)}",
            why="packages add operations, and those that added these are not loaded",
            fix=f"install or import {', '.join(packages)}"
            if packages
            else "install the version that saved it",
        )


def _parameters(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ParameterStore:
    tied = data["tied"]
    wrapped = {name: Parameter(tensor) for name, tensor in tensors.items()}
    missing = [name for name in data["order"] if tied.get(name, name) not in wrapped]
    if missing or len(set(data["order"])) != len(data["order"]):
        raise ProgramError(
            f"{PARAMETERS} does not fit the program", why=f"missing tensors: {', '.join(missing)}"
        )
    return ParameterStore({name: wrapped[tied.get(name, name)] for name in data["order"]})


def _read_function(function: Function, data: Mapping[str, Any]) -> None:
    build, made = function.builder(), {}

    def look_up(name: str) -> fx.Node:
        if name not in made:
            raise ProgramError(f"function {function.name!r} reads %{name} before it is defined")
        return made[name]

    for item in data["nodes"]:
        name = _typed(str, item["name"])
        if name in made:
            raise ProgramError(f"function {function.name!r} defines %{name} twice")
        node = made[name] = _read_node(function, build, item, look_up)
        node.meta.update({key: _typed(str, item[key]) for key in PROVENANCE if key in item})
    results, updates = (
        {_typed(str, name): look_up(_typed(str, node)) for name, node in data[key].items()}
        for key in ("outputs", "updates")
    )
    function.set_outputs(results, updates)


def _read_node(
    function: Function, build: Any, item: Mapping[str, Any], look_up: Callable[[str], fx.Node]
) -> fx.Node:
    name = item["name"]
    if "input" in item:
        return function.add_input(_typed(str, item["input"]), _value_from_json(item["value"]))
    if "state" in item:
        return function.add_state(_typed(str, item["state"]))
    if "parameter" in item:
        if _typed(str, item["parameter"]) not in function.parameters:
            raise ProgramError(f"%{name} reads the parameter {item['parameter']!r}, which does not exist")
        return build.read(item["parameter"])
    op: Op = ops.get(item["op"])
    operands = _from_json(item["operands"], look_up)
    attributes = {key: _from_json(value, look_up) for key, value in item["attributes"].items()}
    node = build.emit(op, *operands, **attributes)
    if node.meta["value"] != _value_from_json(item["value"]):
        raise ProgramError(f"%{name} says {item['value']}, its operands give {node.meta['value']}")
    return node


def _value_from_json(data: Mapping[str, Any]) -> Value:
    if data["dtype"] not in DTYPES:
        raise ProgramError(f"unknown type {data['dtype']!r}")
    shape = tuple(Dim.parse(d) if isinstance(d, str) else _typed(int, d) for d in data["shape"])
    if not all(isinstance(d, Dim) or 0 <= d < 1 << 63 for d in shape):
        raise ProgramError(f"a shape has an impossible size: {data['shape']!r:.80}")
    return Value(data["dtype"], shape)


def _from_json(data: Any, look_up: Callable[[str], fx.Node]) -> Any:
    if isinstance(data, list):
        return tuple(_from_json(item, look_up) for item in data)
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "node":
        return look_up(content)
    if kind == "dim":
        return Dim.parse(content)
    if kind == "float":
        return float(content)
    raise ProgramError(f"an argument of unknown kind {kind!r}")


def _typed(kind: type, data: Any) -> Any:
    if type(data) is not kind:
        raise ProgramError(f"expected {kind.__name__}, found {data!r:.80}")
    return data


def _no_constant(text: str) -> None:
    raise ProgramError(f"{PROGRAM} holds {text}, which is not JSON")
