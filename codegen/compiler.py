"""From a final program to an artifact on disk: legalise, lower, generate code, pack weights, compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax

from tersor.codegen import (
    lowering,
    rules,  # noqa: F401  registers the lowerings
    tuning,
)
from tersor.codegen.artifact import write_artifact
from tersor.codegen.compare import Call, Tensors, compare
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.linker import link
from tersor.codegen.llvm import llvm_target
from tersor.codegen.lowering import Lowered
from tersor.codegen.runtime import load
from tersor.codegen.runtime.manifest import FunctionSignature, Manifest, TensorType
from tersor.codegen.weights import Weight
from tersor.errors import CompileError, TargetError
from tersor.ir.costs import cost
from tersor.ir.dims import Shape
from tersor.ir.program import Function, Program
from tersor.ir.verifier import verify as verify_program
from tersor.targets import Target, check_memory, missing_on_host

Progress = Callable[[str], None]

LOWERING_PASSES = (
    relax.transform.DeadCodeElimination,  # a transposition that its product reads in place
    relax.transform.ToNonDataflow,
    relax.transform.RemovePurityChecking,
    relax.transform.CallTIRRewrite,
    relax.transform.StaticPlanBlockMemory,
    relax.transform.LowerAllocTensor,
    relax.transform.KillAfterLastUse,
    relax.transform.LowerRuntimeBuiltin,
    relax.transform.ComputePrimValue,
    relax.transform.VMShapeLower,
    relax.transform.AttachGlobalSymbol,
)
"""Relax to VM code. Every operation is a kernel of ours by now, so there is nothing to legalise or fuse."""


@dataclass(frozen=True)
class Compilation:
    """A program lowered for a target: what an artifact is made of, and a C export.

    program: the final one; legal: the same in operations that have kernels. tuning: the records that were used.
    """

    program: Program
    legal: Program
    lowered: Lowered
    target: Target
    tuning: tuple[dict[str, Any], ...] = ()

    @property
    def signatures(self) -> dict[str, FunctionSignature]:
        """How each function is called."""
        return {name: signature(f, self.lowered.weights[name]) for name, f in self.legal.functions.items()}

    @property
    def states(self) -> dict[str, TensorType]:
        """What sessions keep, of all functions."""
        return {
            name: TensorType(name, v.dtype, _spell(v.shape))
            for f in self.legal.functions.values()
            for name, v in f.states.items()
        }

    def weights(self) -> dict[str, np.ndarray]:
        """All weights by name, in the layouts that kernels read."""
        distinct = {w.name: w for ws in self.lowered.weights.values() for w in ws}
        return {name: w.load(self.legal.parameters) for name, w in distinct.items()}


def prepare(
    program: Program, target: Target, tune_minutes: float = 0.0, progress: Progress = lambda step: None
) -> Compilation:
    """Makes kernels and their calls of a program.

    Raises:
        TargetError: no code is generated for the target, or it has too little memory.
        CompileError: something in the program has no lowering.
    """
    verify_program(program)
    check_target(program, target)
    progress("lowering")
    legal = lowering.legalize(program)
    lowered, tuned = lowering.lower(legal, target), ()
    if tune_minutes > 0:
        lowered, tuned = tune(legal, lowered, target, tune_minutes, progress)
    return Compilation(program, legal, lowered, target, tuned)


def build(
    compilation: Compilation,
    path: Path,
    *,
    recipe: str = "custom",
    threads: int | None = None,
    verify: bool = True,
    report: Mapping[str, Any] | None = None,
    progress: Progress = lambda step: None,
) -> None:
    """Writes the artifact for a lowered program to the folder ``path``.

    Raises:
        CompileError: the code generator failed.
        BudgetError: the compiled code disagrees with the program (``verify``).
        ArtifactError: the folder cannot be written.
    """
    target = compilation.target
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        scratch = Path(folder)
        progress("generating code")
        generate_code(compilation.lowered.module, target, scratch / "module.so")
        progress("packing weights")
        arrays = compilation.weights()
        manifest = Manifest(
            functions=compilation.signatures,
            states=compilation.states,
            target={key: value for key, value in target.to_dict().items() if key in MANIFEST_TARGET},
            versions=versions(),
            recipe=recipe,
            tuning=compilation.tuning,
            threads=threads,
        )

        def write(place: Path) -> None:
            write_artifact(
                place,
                module=scratch / "module.so",
                weights=arrays,
                manifest=manifest,
                report=dict(report or {}),
            )

        if verify and not missing_on_host(target):
            progress("comparing with the program")
            write(scratch / "unverified.tersor")
            errors = compare_all(compilation.program, scratch / "unverified.tersor", threads)
            manifest = replace(manifest, verified=True, errors=errors)
        progress("saving")
        write(path)


def tune(
    program: Program, lowered: Lowered, target: Target, minutes: float, progress: Progress
) -> tuple[Lowered, tuple[dict[str, Any], ...]]:
    """Times tiles for the program's GEMMs, then lowers it again with the best; with the records that were used.

    Raises:
        TargetError: this machine cannot run the target's code.
    """
    database = tuning.Database(tuning.default_path())
    gemms = [kernel for kernel in lowered.kernels if isinstance(kernel, Gemm)]
    tuning.tune(gemms, target, database, minutes, progress)
    with tuning.using(database):
        lowered = lowering.lower(program, target)
    return lowered, tuple(asdict(record) for record in database.used.values())


MANIFEST_TARGET = ("name", "arch", "mcpu", "mattr", "features", "os")


def generate_code(module: tvm.IRModule, target: Target, path: Path) -> None:
    """Compiles a lowered module to a shared library.

    Raises:
        CompileError: TVM refused the module, or it could not be linked.
    """
    llvm = llvm_target(target)
    try:
        pipeline = tvm.transform.Sequential([make() for make in LOWERING_PASSES])
        executable = relax.build(module, llvm, relax_pipeline=pipeline, exec_mode="compiled")
    except Exception as error:  # TVM raises builtin exceptions of every kind
        raise CompileError(
            "TVM could not compile the lowered program",
            why=str(error).strip().splitlines()[-1],
            fix="report it with the program (tersor inspect)",
        ) from error
    executable.export_library(str(path), fcompile=link)


def compare_all(program: Program, artifact: Path, threads: int | None) -> dict[str, Any]:
    """Contract 1a for every function; the errors found, by function, as plain data for the manifest."""
    session = load(artifact, threads=threads).session()

    def call_of(name: str) -> Call:
        def call(inputs: Tensors, states: MutableMapping[str, torch.Tensor]) -> Tensors:
            for state, value in states.items():
                session.states[state][...] = value.numpy()
            outputs = session.functions[name](**inputs)
            states.update({state: torch.from_numpy(session.states[state].copy()) for state in states})
            return outputs

        return call

    return {
        name: [c.to_dict() for c in compare(function, call_of(name))]
        for name, function in program.functions.items()
    }


def check_target(program: Program, target: Target) -> None:
    """Before any work: the target is one we generate code for, and holds the weights and the largest activations."""
    if target.arch != "x86_64":
        raise TargetError(
            f"target {target.name!r} is not supported yet",
            why=f"code is generated for x86_64 only, the target is {target.arch}",
            fix="choose one of the targets listed by `tersor targets`",
        )
    totals = cost(program)
    needed = totals.parameter_bytes + totals.state_bytes + totals.peak_bytes
    check_memory(target, needed, "the weights, states and activations")


def signature(function: Function, weights: tuple[Weight, ...]) -> FunctionSignature:
    """What the runtime needs to know to call a function."""
    return FunctionSignature(
        inputs=tuple(TensorType(name, v.dtype, _spell(v.shape)) for name, v in function.inputs.items()),
        outputs=tuple(
            TensorType(name, node.meta["value"].dtype, _spell(node.meta["value"].shape))
            for name, node in zip(function.outputs, function.results, strict=True)
        ),
        dims={name: (r.min, r.max) for name, r in function.dims.items()},
        weights=tuple(w.name for w in weights),
        states=tuple(function.states),
        example=dict(function.example),
    )


def versions() -> dict[str, str]:
    """What made the artifact; it loads with the same TVM minor version."""
    packages = {"tersor": "tersor", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    return {key: metadata.version(package) for key, package in packages.items()}


def _spell(shape: Shape) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d) for d in shape)
