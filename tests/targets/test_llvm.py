"""LLVM understands the names targets use, and generates full-width fused multiply-adds from them."""

from __future__ import annotations

import re

import pytest
import tvm
from tvm.script import tirx as T

from tersor import targets
from tersor.targets import arm, x86


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


def llvm_target(
    mcpu: str, mattr: tuple[str, ...] = (), triple: str = "x86_64-linux-gnu"
) -> tvm.target.Target:
    values = {"kind": "llvm", "mtriple": triple, "mcpu": mcpu, "mattr": list(mattr)}
    return tvm.target.Target(values)


def llvm_features(mcpu: str, triple: str = "x86_64-linux-gnu") -> set[str]:
    return set(tvm.target.codegen.llvm_get_cpu_features(llvm_target(mcpu, triple=triple)))


def assembly(function: tvm.tirx.PrimFunc, target: targets.Target) -> str:
    llvm = llvm_target(target.mcpu, target.mattr, target.llvm_triple)
    return tvm.compile(function, llvm).mod.inspect_source("asm")


MULTIPLY_ADD = {
    "native": r"vfm\w+ps\b.*%[yz]mm",
    "x86-64-v3": r"vfm\w+ps\b.*%ymm",
    "x86-64-v4": r"vfm\w+ps\b.*%zmm",
    "armv8-a": r"fmla\t.*\.4s",
    "armv8.6-i8mm": r"fmla\t.*\.4s",
}


@pytest.mark.parametrize("name", MULTIPLY_ADD)
@pytest.mark.parametrize("function", [vector_fma, plain_loop], ids=["vectors", "loop"])
def test_full_width_fused_multiply_add(name: str, function: tvm.tirx.PrimFunc) -> None:
    assert re.search(MULTIPLY_ADD[name], assembly(function, targets.resolve(name)))


def test_vectors_of_32_bit_cpus_are_neon_registers() -> None:
    # plain loops stay scalar there: NEON treats denormals as zeros, so LLVM uses it only when told to
    for name, instruction in (("moto-g-2013", "vfma.f32"), ("armv7-neon", "vm(la|ul).f32")):
        assert re.search(rf"{instruction}\tq", assembly(vector_fma, targets.resolve(name)))


def test_llvm_knows_every_cpu_and_feature() -> None:
    known = set(tvm.target.codegen.llvm_get_cpu_archlist(llvm_target("x86-64")))
    cpus = {*x86.LEVELS, *x86.INTEL_MODELS, "cascadelake", "cooperlake", *(f"znver{n}" for n in range(1, 6))}
    assert cpus <= known
    newest = llvm_features("znver5") | llvm_features("graniterapids") | llvm_features("sierraforest")
    assert set(x86.LLVM_FEATURES) <= newest


@pytest.mark.parametrize("level", x86.LEVELS)
def test_levels_are_those_of_llvm(level: str) -> None:
    assert x86.LEVELS[level] == llvm_features(level) & set(x86.LLVM_FEATURES)


ARM_TRIPLES = {"aarch64": "aarch64-linux-gnu", "armv7a": "armv7a-linux-gnueabihf"}


@pytest.mark.parametrize(
    ("arch", "core"), [(arch, core) for arch, cores in arm.CORES.items() for core in cores]
)
def test_arm_cores_have_the_features_that_llvm_gives_them(arch: str, core: str) -> None:
    names = {**arm.LLVM_FEATURES[arch], **{name: name for name in arm.FACTS}}
    known = llvm_features(core, ARM_TRIPLES[arch])
    assert arm.CORES[arch][core] == {name for name, llvm in names.items() if llvm in known}
