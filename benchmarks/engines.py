"""One class per engine: how it loads a model for a fixed shape, and one call. Imported inside worker processes only.

An engine gets the model, example inputs (numpy, by name) and the number of threads; it returns its first output as numpy.
Everything is float32: engines that would lower the precision on their own are told not to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.models import Model

Inputs = dict[str, np.ndarray]


class Engine(Protocol):
    """Loads one model at a time. `version` names the package and its version for the report."""

    version: str

    def __init__(self, threads: int, cache: Path): ...

    def load(self, model: Model, inputs: Inputs) -> Callable[[], np.ndarray]:
        """Prepare everything; the returned function is one timed call."""
        ...


class _Torch:
    """What the engines that start from the torch model share: threads, and the model built once."""

    def __init__(self, threads: int, cache: Path):
        import torch

        torch.set_num_threads(threads)
        self.version = f"torch {torch.__version__}"
        self._built: tuple[str, torch.nn.Module] | None = None

    def module(self, model: Model):
        if self._built is None or self._built[0] != model.name:
            self._built = None
            self._built = (model.name, model.build())
        return self._built[1]

    def tensors(self, inputs: Inputs):
        import torch

        return {name: torch.from_numpy(value) for name, value in inputs.items()}


class TorchEager(_Torch):
    """PyTorch as it comes: the reference for every other engine's output."""

    def prepare(self, model: Model):
        return self.module(model)

    def load(self, model: Model, inputs: Inputs) -> Callable[[], np.ndarray]:
        import torch

        module, tensors = self.prepare(model), self.tensors(inputs)

        def call() -> np.ndarray:
            with torch.inference_mode():
                return module(**tensors)[0].numpy()

        return call


class TorchCompile(TorchEager):
    """torch.compile with Inductor's C++ backend, a fresh static compile for each shape."""

    def prepare(self, model: Model):
        import torch

        torch.compiler.reset()
        return torch.compile(self.module(model), dynamic=False)


class Onnxruntime:
    """onnxruntime's CPU provider, all graph optimisations, dimensions fixed."""

    def __init__(self, threads: int, cache: Path):
        import onnxruntime

        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._threads, self._cache = threads, cache

    def load(self, model: Model, inputs: Inputs) -> Callable[[], np.ndarray]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        for name, axes in model.dynamic_axes().items():
            for axis, dimension in axes.items():
                options.add_free_dimension_override_by_name(dimension, inputs[name].shape[axis])
        session = onnxruntime.InferenceSession(
            str(onnx_file(model, self._cache)), options, providers=["CPUExecutionProvider"]
        )
        first = [session.get_outputs()[0].name]
        return lambda: session.run(first, inputs)[0]


class Openvino:
    """OpenVINO's CPU plugin with the latency hint, shapes fixed, f32 asked for (its own choice here would be bf16)."""

    def __init__(self, threads: int, cache: Path):
        import openvino

        self.version = f"openvino {openvino.__version__.split('-')[0]}"
        self._threads, self._cache = threads, cache

    def load(self, model: Model, inputs: Inputs) -> Callable[[], np.ndarray]:
        import openvino

        core = openvino.Core()
        graph = core.read_model(onnx_file(model, self._cache))
        graph.reshape({name: list(value.shape) for name, value in inputs.items()})
        options = {
            "INFERENCE_NUM_THREADS": self._threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(graph, "CPU", options)
        return lambda: compiled(inputs, share_inputs=True, share_outputs=True)[0]


class TvmDefault(_Torch):
    """Apache TVM's own importer and default CPU pipeline: what a user gets from TVM without our kernels."""

    def load(self, model: Model, inputs: Inputs) -> Callable[[], np.ndarray]:
        import torch
        import tvm
        from tvm import relax
        from tvm.relax.frontend.torch import from_exported_program

        self.version = f"apache-tvm {tvm.__version__}"
        tensors = self.tensors(inputs)
        exported = torch.export.export(self.module(model), (), kwargs=tensors, strict=False)
        with torch.no_grad():
            lowered = from_exported_program(exported, keep_params_as_input=False)
        machine = relax.VirtualMachine(tvm.compile(lowered, target="llvm -mcpu=native"), tvm.cpu())
        arguments = [tvm.runtime.tensor(value) for value in inputs.values()]
        return lambda: machine["main"](*arguments)[0].numpy()


class Tersor(_Torch):
    """Us: a static f32 compile for this machine."""

    def load(self, model: Model, inputs: Inputs) -> Callable[[], np.ndarray]:
        import tersor

        self.version = f"tersor {tersor.__version__}"
        compiled = tersor.compile(self.module(model), inputs, target="native", threads=self._threads)
        return lambda: next(iter(compiled(**inputs).values()))


ENGINES: dict[str, type[Engine]] = {
    "tersor": Tersor,
    "openvino": Openvino,
    "onnxruntime": Onnxruntime,
    "torch": TorchEager,
    "torch.compile": TorchCompile,
    "tvm": TvmDefault,
}


def onnx_file(model: Model, cache: Path) -> Path:
    """The model as ONNX with named dynamic dimensions, exported once per model, configuration and exporter version."""
    import hashlib
    import os
    import tempfile

    import torch
    import transformers

    key = repr((model.architecture, model.config, model.mask, torch.__version__, transformers.__version__))
    folder = cache / f"{model.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder / "model.onnx"
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    # Example sizes above 1: an exporter may take 1 for a constant.
    tensors = {name: torch.from_numpy(value) for name, value in model.inputs(2, 16).items()}
    dynamic = {
        name: {axis: torch.export.Dim(dimension) for axis, dimension in axes.items()}
        for name, axes in model.dynamic_axes().items()
    }
    with torch.no_grad():
        torch.onnx.export(
            model.build(),
            (),
            str(scratch / "model.onnx"),
            kwargs=tensors,
            dynamo=True,
            dynamic_shapes=dynamic,
            external_data=True,
            verbose=False,
        )
    os.replace(scratch, folder)
    return folder / "model.onnx"
