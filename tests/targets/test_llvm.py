"""LLVM understands the names targets use, and generates full-width fused multiply-adds from them."""

from __future__ import annotations

import re

import pytest
import tvm
from tvm.script import tirx as T

from tersor import targets
from tersor.targets import x86


@T.prim_func(s_tir=True)
def vector_fma(A: T.Buffer((64,), "float32"), B: T.Buffer((64,), "float32"), C: T.Buffer((64,), "float32")):
    T.func_attr({"tirx.noalias": True, "global_symbol": "vector_fma"})
    for i in range(4):
        C[T.ramp(i * 16, 1, 16)] = (
            A[T.ramp(i * 16, 1, 16)] * B[T.ramp(i * 16, 1, 16)] + C[T.ramp(i * 16, 1, 16)]
        )


@T.prim_func(s_tir=True)
def plain_loop(
    A: T.Buffer((4096,), "float32"), B: T.Buffer((4096,), "float32"), C: T.Buffer((4096,), "float32")
):
    T.func_attr({"tirx.noalias": True, "global_symbol": "plain_loop"})
    for i in range(4096):
        C[i] = A[i] * B[i] + C[i]


def llvm_target(mcpu: str, mattr: tuple[str, ...] = ()) -> tvm.target.Target:
    values = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu, "mattr": list(mattr)}
    return tvm.target.Target(values)


def llvm_features(mcpu: str) -> set[str]:
    return set(tvm.target.codegen.llvm_get_cpu_features(llvm_target(mcpu)))


def assembly(function: tvm.tirx.PrimFunc, target: targets.Target) -> str:
    return tvm.compile(function, llvm_target(target.mcpu, target.mattr)).mod.inspect_source("asm")


@pytest.mark.parametrize("name", targets.names())
@pytest.mark.parametrize("function", [vector_fma, plain_loop], ids=["vectors", "loop"])
def test_full_width_fused_multiply_add(name: str, function: tvm.tirx.PrimFunc) -> None:
    target = targets.resolve(name)
    register = {512: "zmm", 256: "ymm"}[target.vector_bits]
    assert re.search(rf"vfm\w+ps\b.*%{register}", assembly(function, target))


def test_llvm_knows_every_cpu_and_feature() -> None:
    known = set(tvm.target.codegen.llvm_get_cpu_archlist(llvm_target("x86-64")))
    cpus = {*x86.LEVELS, *x86.INTEL_MODELS, "cascadelake", "cooperlake", *(f"znver{n}" for n in range(1, 6))}
    assert cpus <= known
    newest = llvm_features("znver5") | llvm_features("graniterapids") | llvm_features("sierraforest")
    assert set(x86.LLVM_FEATURES) <= newest


@pytest.mark.parametrize("level", x86.LEVELS)
def test_levels_are_those_of_llvm(level: str) -> None:
    assert x86.LEVELS[level] == llvm_features(level) & set(x86.LLVM_FEATURES)
