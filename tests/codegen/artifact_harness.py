"""A tiny compiled model for the tests of artifacts and of the runtime: every kind of input, output and weight once."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tersor.codegen.artifact import write_artifact
from tersor.codegen.runtime import FunctionSignature, Manifest, TensorType
from tersor.targets import resolve

WIDTH, ROWS = 8, 16

SIGNATURE = FunctionSignature(
    inputs=(
        TensorType("x", "float32", ("batch", "length", WIDTH)),
        TensorType("ids", "int64", ("batch", "length")),
        TensorType("mask", "bool", ("batch", "length")),
        TensorType("scale", "float32", ()),
    ),
    outputs=(
        TensorType("hidden", "float32", ("batch", "length", WIDTH)),
        TensorType("extra.0", "float32", ("batch*length",)),
        TensorType("extra.1.echo", "float32", ("batch", "length", WIDTH)),
        TensorType("matrix", "float32", (WIDTH, WIDTH)),
    ),
    dims={"batch": (1, 4), "length": (1, 64)},
    weights=("table", "matrix"),
    example={"batch": 2, "length": 5},
)


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        "table": random.standard_normal((ROWS, WIDTH)).astype(np.float32),
        "matrix": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
    }


def inputs(batch: int = 2, length: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((batch, length, WIDTH)).astype(np.float32),
        "ids": random.integers(0, ROWS, (batch, length)),
        "mask": random.random((batch, length)) < 0.8,
        "scale": np.float32(random.random() + 0.5),
    }


def expected(x: np.ndarray, ids: np.ndarray, mask: np.ndarray, scale: Any) -> np.ndarray:
    """The output `hidden`; `extra.0` is its sum over the last axis, the others are x and the weight."""
    packed = weights()
    return np.where(mask[..., None], (x + packed["table"][ids]) @ packed["matrix"] * scale, 0).astype(
        np.float32
    )


@cache
def module_bytes() -> bytes:
    """The compiled model, as lowering would make it; one parallel kernel and one serial."""
    from tvm import relax, tirx
    from tvm.script import relax as R
    from tvm.script import tirx as T

    from tersor.codegen.compiler import generate_code

    @T.prim_func(private=True)
    def mix(
        x_: T.handle,
        ids_: T.handle,
        mask_: T.handle,
        scale_: T.handle,
        table_: T.handle,
        matrix_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, length = T.int64(), T.int64()
        x = T.match_buffer(x_, (batch, length, 8), "float32")
        ids = T.match_buffer(ids_, (batch, length), "int64")
        mask = T.match_buffer(mask_, (batch, length), "bool")
        scale = T.match_buffer(scale_, (), "float32")
        table = T.match_buffer(table_, (16, 8), "float32")
        matrix = T.match_buffer(matrix_, (8, 8), "float32")
        out = T.match_buffer(out_, (batch, length, 8), "float32")
        for row in T.parallel(batch * length):
            total = T.alloc_buffer((8,), "float32", scope="local")
            for lane in T.vectorized(8):
                total[lane] = T.float32(0)
            for k in range(8):
                for lane in T.vectorized(8):
                    total[lane] = (
                        total[lane]
                        + (x[row // length, row % length, k] + table[ids[row // length, row % length], k])
                        * matrix[k, lane]
                    )
            for lane in T.vectorized(8):
                out[row // length, row % length, lane] = T.if_then_else(
                    mask[row // length, row % length], total[lane] * scale[()], T.float32(0)
                )

    @T.prim_func(private=True)
    def flatten(hidden_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch, length = T.int64(), T.int64()
        hidden = T.match_buffer(hidden_, (batch, length, 8), "float32")
        out = T.match_buffer(out_, (batch * length,), "float32")
        for row in range(batch * length):
            out[row] = T.float32(0)
            for k in range(8):
                out[row] = out[row] + hidden[row // length, row % length, k]

    batch, length = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
    x = relax.Var("x", R.Tensor((batch, length, 8), "float32"))
    ids = relax.Var("ids", R.Tensor((batch, length), "int64"))
    mask = relax.Var("mask", R.Tensor((batch, length), "bool"))
    scale = relax.Var("scale", R.Tensor((), "float32"))
    table = relax.Var("table", R.Tensor((16, 8), "float32"))
    matrix = relax.Var("matrix", R.Tensor((8, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, ids, mask, scale, table, matrix]):
        mix_, flatten_ = builder.add_func(mix, "mix"), builder.add_func(flatten, "flatten")
        with builder.dataflow():
            arguments = (x, ids, mask, scale, table, matrix)
            hidden = builder.emit(relax.call_tir(mix_, arguments, R.Tensor((batch, length, 8), "float32")))
            flat = builder.emit(relax.call_tir(flatten_, (hidden,), R.Tensor((batch * length,), "float32")))
            # The input and the weight themselves are outputs, which the runtime must not hand out.
            result = builder.emit_output(relax.Tuple([hidden, flat, x, matrix]))
        builder.emit_func_output(result)
    module = builder.get()
    module["main"] = module["main"].with_attr("tir_var_upper_bound", {"batch": 4, "length": 64})
    with tempfile.TemporaryDirectory() as folder:
        generate_code(module, resolve("x86-64-v3"), Path(folder, "module.so"))
        return Path(folder, "module.so").read_bytes()


def manifest(**changes: Any) -> Manifest:
    target = resolve("x86-64-v3")
    made = Manifest(
        functions={"main": SIGNATURE},
        target={"name": target.name, "arch": target.arch, "mcpu": target.mcpu, "os": "linux"},
        versions={"tersor": "0.1.0", "tvm": metadata.version("apache-tvm"), "tvm_ffi": "0.1"},
        verified=True,
        errors={"hidden": 1e-7},
    )
    return replace(made, **changes)


def write(path: Path, **changes: Any) -> Path:
    """An artifact at `path`; `changes` replace arguments of `write_artifact`."""
    arguments = {
        "module": module_bytes(),
        "weights": weights(),
        "manifest": manifest(),
        "report": {"steps": []},
    }
    return write_artifact(path, **(arguments | changes))
