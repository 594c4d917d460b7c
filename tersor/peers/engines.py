"""One class per engine: how it prepares a model for one shape, and one call. Used inside worker processes.

Everything is float32 unless a class says otherwise: engines that would lower the precision are told not to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tersor.peers.source import Inputs, OnnxFile, Source

if TYPE_CHECKING:
    import openvino
    import torch

    import tersor

Call = Callable[[], np.ndarray]


class Engine(Protocol):
    """Holds one model at a time; `version` names the package and its version."""

    version: str

    def __init__(self, threads: int): ...

    def load(self, source: Source, inputs: Inputs) -> Call:
        """Prepare the model for these inputs; the result is one call, which gives the first output."""
        ...


class Torch:
    """What engines that start from the torch model share: the number of threads, the model built once."""

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.version = f"torch {torch.__version__}"
        self._threads = threads
        self._built: tuple[str, torch.nn.Module] | None = None

    def module(self, source: Source) -> torch.nn.Module:
        if self._built is None or self._built[0] != source.content:
            self._built = None  # the old one must not wait for the new one in memory
            self._built = (source.content, source.build())
        return self._built[1]

    @staticmethod
    def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
        import torch

        return {name: torch.from_numpy(value) for name, value in inputs.items()}


class TorchEager(Torch):
    """PyTorch as it comes: the reference for every other engine's output."""

    def load(self, source: Source, inputs: Inputs) -> Call:
        import torch

        module, tensors = self.prepare(source), self.tensors(inputs)

        def call() -> np.ndarray:
            with torch.inference_mode():
                return module(**tensors)[0].numpy()

        return call

    def prepare(self, source: Source) -> Callable[..., tuple[torch.Tensor, ...]]:
        return self.module(source)


class TorchCompile(TorchEager):
    """torch.compile with Inductor's C++ backend, compiled afresh for each shape."""

    def prepare(self, source: Source) -> Callable[..., tuple[torch.Tensor, ...]]:
        import torch

        torch.compiler.reset()
        return torch.compile(self.module(source), dynamic=False)


class Onnxruntime:
    """onnxruntime's CPU provider with all its graph optimisations, dimensions fixed."""

    def __init__(self, threads: int):
        import onnxruntime

        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._threads = threads

    def load(self, source: Source, inputs: Inputs) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        for name, axes in source.dynamic_axes.items():
            for axis, dimension in axes.items():
                options.add_free_dimension_override_by_name(dimension, inputs[name].shape[axis])
        file = str(self.file(source, inputs))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        first = [session.get_outputs()[0].name]
        return lambda: session.run(first, inputs)[0]

    def file(self, source: Source, inputs: Inputs) -> Path:
        return onnx_file(source, inputs)


class Openvino:
    """OpenVINO's CPU plugin with its latency hint, shapes fixed, f32 asked for (some CPUs would get bf16)."""

    precision = "f32"

    def __init__(self, threads: int):
        import openvino

        self.version = f"openvino {openvino.__version__.split('-')[0]}"
        self._threads = threads

    def load(self, source: Source, inputs: Inputs) -> Call:
        import openvino

        options = {
            "INFERENCE_NUM_THREADS": self._threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        compiled = openvino.Core().compile_model(self.graph(source, inputs), "CPU", options)
        return lambda: compiled(inputs, share_inputs=True, share_outputs=True)[0]

    def graph(self, source: Source, inputs: Inputs) -> openvino.Model:
        import openvino

        graph = openvino.Core().read_model(onnx_file(source, inputs))
        graph.reshape({name: list(value.shape) for name, value in inputs.items()})
        return graph


class Tersor(Torch):
    """Us: the source's artifact where it has one, else a compile for this machine and these shapes."""

    recipe = "fp32"

    def __init__(self, threads: int):
        import tersor

        self.version = f"tersor {tersor.__version__}"
        self._threads = threads
        self._built = None

    def load(self, source: Source, inputs: Inputs) -> Call:
        import tersor

        if source.artifact:
            compiled = tersor.load(source.artifact, threads=self._threads)
        else:
            compiled = self.compile(source, inputs)
        return lambda: compiled(**inputs)[0]

    def compile(self, source: Source, inputs: Inputs) -> tersor.CompiledModel:
        """The source compiled for these shapes."""
        import tersor

        return tersor.compile(
            self.module(source),
            self.tensors(inputs),
            recipe=self.recipe,
            calibration=self.calibration(source, inputs),
            threads=self._threads,
        )

    def calibration(self, source: Source, inputs: Inputs) -> Iterable[Inputs] | None:
        return None


def cache_folder() -> Path:
    """Where exported models are kept between runs, in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor" / "onnx"


def onnx_file(source: Source, inputs: Inputs) -> Path:
    """The model as ONNX with named dynamic dimensions: its file, or exported once per model and exporter version."""
    if isinstance(source, OnnxFile):
        return source.path
    import torch
    import transformers

    key = repr((source.content, torch.__version__, transformers.__version__))
    cache = cache_folder()
    folder = cache / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as scratch:
            _export(source, inputs, Path(scratch) / "model")
            os.replace(Path(scratch) / "model", folder)
    return folder / "model.onnx"


def _export(source: Source, inputs: Inputs, folder: Path) -> None:
    import torch

    folder.mkdir()
    dynamic = {
        name: {axis: torch.export.Dim(dimension) for axis, dimension in axes.items()}
        for name, axes in source.dynamic_axes.items()
    }
    with torch.no_grad():
        torch.onnx.export(
            source.build(),
            (),
            str(folder / "model.onnx"),
            kwargs=Torch.tensors({name: _enlarged(value, dynamic[name]) for name, value in inputs.items()}),
            dynamo=True,
            dynamic_shapes=dynamic,
            external_data=True,
            verbose=False,
        )


def _enlarged(value: np.ndarray, axes: dict[int, object]) -> np.ndarray:
    """Repeated along dynamic axes of size 1, which the exporter would take for a constant."""
    return np.tile(value, [2 if axis in axes and size == 1 else 1 for axis, size in enumerate(value.shape)])
