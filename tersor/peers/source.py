"""Where a model comes from: something small to send to another process, which builds the model there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

Inputs = dict[str, np.ndarray]
DynamicAxes = dict[str, dict[int, str]]


class Source(Protocol):
    """A model to compare engines on. Sources are compared by value and can be pickled."""

    @property
    def name(self) -> str:
        """Short name, part of a file name."""
        ...

    @property
    def content(self) -> str:
        """Text that changes whenever the model does: keys the cache of exported files."""
        ...

    @property
    def dynamic_axes(self) -> DynamicAxes:
        """Input name -> axis -> dimension name, for axes whose size may differ between calls."""
        ...

    @property
    def artifact(self) -> Path | None:
        """The compiled model to use for ourselves; None compiles the model when it is loaded."""
        ...

    def build(self) -> torch.nn.Module:
        """The model, in evaluation mode."""
        ...


@dataclass(frozen=True)
class Folder:
    """A transformers model in a local folder (config.json and safetensors)."""

    path: Path
    inputs: tuple[str, ...]
    artifact: Path | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def content(self) -> str:
        files = sorted(p for p in self.path.iterdir() if p.suffix in (".json", ".safetensors"))
        described = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return repr((str(self.path.resolve()), described, self.inputs))

    @property
    def dynamic_axes(self) -> DynamicAxes:
        texts = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        return {name: {0: "batch", 1: "length"} if name in texts else {0: "batch"} for name in self.inputs}

    def build(self) -> torch.nn.Module:
        from tersor.frontends import transformers

        return transformers.load(self.path)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file, which the engines in `tersor.peers.ON_FILES` read as it is."""

    path: Path
    artifact: Path | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def content(self) -> str:
        state = self.path.stat()
        return repr((str(self.path), state.st_size, state.st_mtime_ns))

    @property
    def dynamic_axes(self) -> DynamicAxes:
        """The sizes that the file names."""
        import onnx

        graph = onnx.load(self.path, load_external_data=False).graph
        stored = {tensor.name for tensor in graph.initializer}
        return {
            i.name: {a: d.dim_param for a, d in enumerate(i.type.tensor_type.shape.dim) if d.dim_param}
            for i in graph.input
            if i.name not in stored
        }

    def build(self) -> torch.nn.Module:
        raise TypeError(f"{self.path.name} is an ONNX file, not a torch module")
