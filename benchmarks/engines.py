"""Engines that only the benchmarks measure, beside those of `tersor.peers`: other precisions, TVM's default pipeline.

Engines that need data to quantize take a source with a method ``calibration(inputs)``, which gives batches of the same
shapes as the inputs (`benchmarks.models`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.peers import ENGINES as PEERS
from tersor.peers import OURS, US
from tersor.peers.engines import Call, Onnxruntime, Openvino, Tersor, Torch, cache_folder, onnx_file
from tersor.peers.source import Inputs, Source

if TYPE_CHECKING:
    import openvino


class TersorBfloat16(Tersor):
    """Our recipe bf16."""

    recipe = "bf16"


class TersorInt8(Tersor):
    """Our recipe int8."""

    recipe = "int8"

    def calibration(self, source: Source, inputs: Inputs) -> Iterable[Inputs]:
        return source.calibration(inputs)


class TersorInt8Dynamic(Tersor):
    """Our recipe int8-dynamic."""

    recipe = "int8-dynamic"


class TersorC(Tersor):
    """What our recipe compiles, as plain C: a call is one of the C function, with its arguments made before."""

    def load(self, source: Source, inputs: Inputs) -> Call:
        self._session = self._folder = None  # the old one must not wait for the new one in memory
        self._folder = tempfile.TemporaryDirectory(prefix="tersor-")
        folder = self.compile(source, inputs).export_c(Path(self._folder.name, "exported"))
        spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._session = module.load().session(threads=self._threads)
        call = self._session.bound("main", **inputs)
        return lambda: next(iter(call().values()))


class TersorBfloat16C(TersorC, TersorBfloat16):
    """The same of the recipe bf16."""


class TersorInt8C(TersorC, TersorInt8):
    """The same of the recipe int8."""


class TersorInt8DynamicC(TersorC, TersorInt8Dynamic):
    """The same of the recipe int8-dynamic."""


class OpenvinoBfloat16(Openvino):
    """OpenVINO, asked for bf16."""

    precision = "bf16"


class OpenvinoInt8(Openvino):
    """A model that NNCF has quantized, in OpenVINO; what is left in floats computes in f32."""

    def __init__(self, threads: int):
        import nncf

        super().__init__(threads)
        self._nncf = nncf.__version__
        self.version += f", nncf {self._nncf}"

    def graph(self, source: Source, inputs: Inputs) -> openvino.Model:
        import openvino

        shapes = {name: value.shape for name, value in inputs.items()}
        key = repr((source.content, shapes, openvino.__version__, self._nncf))

        def make(folder: Path) -> None:
            graph = nncf_quantized(
                super(OpenvinoInt8, self).graph(source, inputs), source.calibration(inputs)
            )
            openvino.save_model(graph, folder / "model.xml", compress_to_fp16=False)

        return openvino.Core().read_model(_cached(f"{source.name}-nncf", key, make) / "model.xml")


class OpenvinoInt8Bfloat16(OpenvinoInt8):
    """The same; what is left in floats computes in bf16."""

    precision = "bf16"


class OnnxruntimeInt8(Onnxruntime):
    """onnxruntime's dynamic quantization: weights in int8, activations in codes whose scales are found at run time."""

    def file(self, source: Source, inputs: Inputs) -> Path:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        original = onnx_file(source, inputs)

        def make(folder: Path) -> None:
            quantize_dynamic(
                original, folder / "model.onnx", weight_type=QuantType.QInt8, use_external_data_format=True
            )

        key = repr((str(original), onnxruntime.__version__))
        return _cached(f"{source.name}-ort-dynamic", key, make) / "model.onnx"


class TvmDefault(Torch):
    """Apache TVM's own importer and default CPU pipeline: what TVM gives without our lowering and kernels."""

    def load(self, source: Source, inputs: Inputs) -> Call:
        import torch
        import tvm
        from tvm import relax
        from tvm.relax.frontend.torch import from_exported_program

        self.version = f"apache-tvm {tvm.__version__}"
        exported = torch.export.export(self.module(source), (), kwargs=self.tensors(inputs), strict=False)
        with torch.no_grad():
            module = from_exported_program(exported)
        cpu = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
        machine = relax.VirtualMachine(tvm.compile(module, tvm.target.Target(cpu)), tvm.cpu())
        arguments = [tvm.runtime.tensor(value) for value in inputs.values()]
        return lambda: machine["main"](*arguments)[0].numpy()


def nncf_quantized(graph: openvino.Model, batches: Iterable[Inputs]) -> openvino.Model:
    """The graph in int8 as NNCF makes it for Transformers: static scales, smoothing and bias correction by default."""
    import nncf

    batches = list(batches)
    return nncf.quantize(
        graph,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )


def _cached(name: str, key: str, make: Callable[[Path], Any]) -> Path:
    """A folder in the cache of exported models that `make` fills, once per key."""
    folder = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_folder(), ignore_cleanup_errors=True) as scratch:
            made = Path(scratch, "model")
            made.mkdir()
            make(made)
            os.replace(made, folder)
    return folder


_HERE = "benchmarks.engines"
RECIPES = {
    "fp32": OURS,
    "bf16": f"{_HERE}:TersorBfloat16",
    "int8": f"{_HERE}:TersorInt8",
    "int8-dynamic": f"{_HERE}:TersorInt8Dynamic",
}
"""Our recipes: a run compares one of them (``tersor``), and can have others beside it (``tersor-bf16``)."""

AS_C = f"{US}-c"
EXPORTS = {
    "fp32": f"{_HERE}:TersorC",
    "bf16": f"{_HERE}:TersorBfloat16C",
    "int8": f"{_HERE}:TersorInt8C",
    "int8-dynamic": f"{_HERE}:TersorInt8DynamicC",
}
"""The C export of each recipe: `AS_C` is that of the run's."""

OTHERS = {
    **PEERS,
    "tvm": f"{_HERE}:TvmDefault",
    "openvino-bf16": f"{_HERE}:OpenvinoBfloat16",
    "openvino-int8": f"{_HERE}:OpenvinoInt8",
    "openvino-int8-bf16": f"{_HERE}:OpenvinoInt8Bfloat16",
    "onnxruntime-int8": f"{_HERE}:OnnxruntimeInt8",
    **{f"{US}-{recipe}": engine for recipe, engine in RECIPES.items()},
}
"""Every engine that can stand beside, by name."""

BESIDE = {
    "fp32": tuple(PEERS),
    "bf16": ("openvino-bf16", "torch"),
    "int8": ("openvino-int8", "openvino-int8-bf16", "torch"),
    "int8-dynamic": ("onnxruntime-int8", "torch"),
}
"""Those that stand beside a recipe by default: the same precision, and torch in f32 to compare results with. TVM's
default pipeline takes seconds to minutes a call and is measured when asked for."""


def engines(recipe: str) -> dict[str, str]:
    """Every engine by name for a run of this recipe."""
    return {US: RECIPES[recipe], AS_C: EXPORTS[recipe], **OTHERS}
