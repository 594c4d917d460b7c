"""Between outside formats and the program: `capture` gives a `tersor.ir.Program` in canonical form, whatever comes.

torch_export    any torch.nn.Module, through torch.export; `aten` has what each operator becomes
transformers    model objects and local folders of Hugging Face transformers
static_cache    their decoders with a cache of keys and values
onnx            ONNX files in; `onnx.export` writes a program out as one
dynamic         named dynamic dimensions; `symbols` translates torch's
origin          module paths, source lines, and torch.export's failures in our words
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from tersor.ir import Program

__all__ = ["capture"]


def is_onnx(model: Any) -> bool:
    """Whether a model is an ONNX file by its name, or what the package onnx makes of one."""
    if isinstance(model, str | Path):
        return Path(model).suffix.lower() == ".onnx"
    return type(model).__name__ == "ModelProto" and type(model).__module__.startswith("onnx")


def capture(
    model: nn.Module | str | Path,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]] | str | None = None,
    *,
    name: str = "main",
    into: Program | None = None,
    allow_nonfinite: bool = False,
) -> Program:
    """Captures a model as a program; buffers that it writes to (caches) become states.

    Args:
        model: a ``torch.nn.Module``, a transformers model, a local folder with config.json and safetensors, or an ONNX
            file (a path that ends in .onnx, or an ``onnx.ModelProto``).
        example_inputs: arguments of ``forward`` by name, or a tuple in its order; may be left out for transformers
            models, for which they are made.
        dynamic: ``{"input_ids": {0: ("batch", 1, 8), 1: ("length", 1, 512)}}``; masks and ids of the
            same text follow in models of transformers. ``"auto"`` gives those a batch of 1 to 8 and every length they
            can take. Everything is static when left out.
        name: of the program's function.
        into: a program to add the function to, instead of a new one. Functions share states by name, and parameters
            where name and contents are equal.
        allow_nonfinite: accept NaN and infinity in parameters.

    Raises:
        InputError: the folder, the example inputs, the dynamic dimensions or a weight are unusable.
        UnsupportedOpError: the model has operators outside the dialect; the message lists all of them.
        CaptureError: torch.export cannot trace the model.
        ProgramError: ``into`` has a function of this name, or a state of another shape; it is as it was then.
    """
    if into is None:
        return _capture(model, example_inputs, dynamic, name=name, allow_nonfinite=allow_nonfinite)
    from tersor.errors import InputError
    from tersor.ir import Program, verify

    if not isinstance(into, Program):
        raise InputError(f"into is a {type(into).__name__}", fix="give a program that capture() made")
    if name in into.functions:
        raise InputError(
            f"the program has a function {name!r} already", fix="give the new one another name: name=..."
        )
    options = {"name": name, "allow_nonfinite": allow_nonfinite, "states": frozenset(into.states)}
    program = _capture(model, example_inputs, dynamic, **options)
    _check_kinds(program, into)
    _agree_on_layouts(program, into)
    into.merge(program)
    verify(into)
    return into


def _check_kinds(program: Program, into: Program) -> None:
    """A buffer is a state of all functions or a parameter of all."""
    from tersor.errors import CaptureError

    if written := sorted(program.states.keys() & into.parameters.keys()):
        raise CaptureError(
            f"the model writes to {', '.join(written)}, parameters of the program",
            why="functions that were captured before have built in what they held",
            fix="capture the function that writes to them first",
        )


def _agree_on_layouts(program: Program, into: Program) -> None:
    """A cache that one of them stores with merged heads, the other stores like that too."""
    from tersor.ir.canonicalize.states import merge_heads_of_state, merged_heads

    for name in program.states.keys() & into.states.keys():
        for one, other in ((program, into), (into, program)):
            if merged_heads(one.states[name]) == other.states[name]:
                merge_heads_of_state(one, name)


def _capture(
    model: Any, example_inputs: Any, dynamic: Any, *, states: Collection[str] = (), **options: Any
) -> Program:
    from tersor.errors import InputError
    from tersor.frontends import torch_export, transformers

    if is_onnx(model):
        from tersor.frontends import onnx

        return onnx.capture(model, example_inputs, None if dynamic == "auto" else dynamic, **options)
    if isinstance(model, str | Path):
        model = transformers.load(model)
    model = transformers.unwrap(model)
    if transformers.is_transformers_model(model):
        return transformers.capture(model, example_inputs, dynamic, states=states, **options)
    if example_inputs is None:
        raise InputError(
            f"a {type(model).__name__} needs example inputs",
            why="they are made up for transformers models only",
            fix="give a dict of tensors by argument name, or a tuple in the order of forward",
        )
    if isinstance(dynamic, str):
        raise InputError(
            f"dynamic is {dynamic!r}",
            why="dimensions are chosen automatically for transformers models only",
            fix='name them: {"x": {0: ("batch", 1, 8)}}',
        )
    return torch_export.capture(model, example_inputs, dynamic, states=states, **options)
