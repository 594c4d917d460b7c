"""Between outside formats and the program: `capture` gives a `tersor.ir.Program` in canonical form, whatever comes.

torch_export    any torch.nn.Module, through torch.export; `aten` has what each operator becomes
transformers    model objects and local folders of Hugging Face transformers
onnx            ONNX files in; `onnx.export` writes a program out as one
dynamic         named dynamic dimensions; `symbols` translates torch's
origin          module paths, source lines, and torch.export's failures in our words
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    allow_nonfinite: bool = False,
) -> Program:
    """Captures a model as a program.

    Args:
        model: a ``torch.nn.Module``, a transformers model, a local folder with config.json and safetensors, or an ONNX
            file (a path that ends in .onnx, or an ``onnx.ModelProto``).
        example_inputs: arguments of ``forward`` by name, or a tuple in its order; may be left out for transformers
            models, for which they are made.
        dynamic: ``{"input_ids": {0: ("batch", 1, 8), 1: ("length", 1, 512)}}``; masks and ids of the
            same text follow in models of transformers. ``"auto"`` gives those a batch of 1 to 8 and every length they
            can take. Everything is static when left out.
        name: of the program's function.
        allow_nonfinite: accept NaN and infinity in parameters.

    Raises:
        InputError: the folder, the example inputs, the dynamic dimensions or a weight are unusable.
        UnsupportedOpError: the model has operators outside the dialect; the message lists all of them.
        CaptureError: torch.export cannot trace the model.
    """
    from tersor.errors import InputError
    from tersor.frontends import torch_export, transformers

    options = {"name": name, "allow_nonfinite": allow_nonfinite}
    if is_onnx(model):
        from tersor.frontends import onnx

        return onnx.capture(model, example_inputs, None if dynamic == "auto" else dynamic, **options)
    if isinstance(model, str | Path):
        model = transformers.load(model)
    model = transformers.unwrap(model)
    if transformers.is_transformers_model(model):
        return transformers.capture(model, example_inputs, dynamic, **options)
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
    return torch_export.capture(model, example_inputs, dynamic, **options)
