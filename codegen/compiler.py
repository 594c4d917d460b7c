"""From a final program to an artifact on disk: legalise, lower, generate code, pack weights, compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax

from tersor.codegen import (
    lowering,
    pipeline,
    rules,  # noqa: F401  registers the lowerings
    tuning,
)
from tersor.codegen.artifact import write_artifact
from tersor.codegen.compare import Call, Comparison, Observed, Tensors, compare
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.linker import link
from tersor.codegen.llvm import llvm_target
from tersor.codegen.lowering import Lowered
from tersor.codegen.observation import with_observers
from tersor.codegen.runtime import load
from tersor.codegen.runtime.manifest import FunctionSignature, Manifest, TensorType
from tersor.codegen.weights import Weight
from tersor.errors import CompileError
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

    program: the final one; legal: the same in operations that have kernels, with the observers. observers: functions
    that are there to be compared with (`observation`), by the functions that they observe; they are no part of what is
    made. tuning: the records that were used.
    """

    program: Program
    legal: Program
    lowered: Lowered
    target: Target
    tuning: tuple[dict[str, Any], ...] = ()
    observers: Mapping[str, Function] = field(default_factory=dict)

    @property
    def signatures(self) -> dict[str, FunctionSignature]:
        """How each function is called."""
        return self._signatures(self.program.functions)

    @property
    def all_signatures(self) -> dict[str, FunctionSignature]:
        """Of the observers too."""
        return self._signatures(self.legal.functions)

    def _signatures(self, names: Iterable[str]) -> dict[str, FunctionSignature]:
        return {name: signature(self.legal.functions[name], self.lowered.weights[name]) for name in names}

    @property
    def states(self) -> dict[str, TensorType]:
        """What sessions keep, of all functions."""
        return {
            name: TensorType(name, v.dtype, _spell(v.shape))
            for f in self.legal.functions.values()
            for name, v in f.states.items()
        }

    def weights(self, signatures: Mapping[str, FunctionSignature] | None = None) -> dict[str, np.ndarray]:
        """All weights by name, in the layouts that kernels read; or those of other functions."""
        names = self.program.functions if signatures is None else signatures
        distinct = {w.name: w for name in names for w in self.lowered.weights[name]}
        return {name: w.load(self.legal.parameters) for name, w in distinct.items()}


def prepare(
    program: Program,
    target: Target,
    tune_minutes: float = 0.0,
    progress: Progress = lambda step: None,
    *,
    verify: bool = True,
) -> Compilation:
    """Makes kernels and their calls of a program; where it is to be compared (``verify``), of observers too.

    Raises:
        TargetError: no code is generated for the target, or it has too little memory.
        CompileError: something in the program has no lowering.
    """
    verify_program(program)
    check_target(program, target)
    progress("lowering")
    compared = verify and not missing_on_host(target)
    whole, observers = with_observers(program) if compared else (program, {})
    legal = lowering.legalize(whole)
    lowered, tuned = lowering.lower(legal, target), ()
    if tune_minutes > 0:
        lowered, tuned = tune(legal, lowered, target, tune_minutes, progress)
    return Compilation(program, legal, lowered, target, tuned, observers)


def build(
    compilation: Compilation,
    path: Path,
    *,
    recipe: str = "custom",
    threads: int | None = None,
    verify: bool = True,
    batches: Mapping[str, Sequence[Tensors]] = MappingProxyType({}),
    report: Mapping[str, Any] | None = None,
    progress: Progress = lambda step: None,
) -> None:
    """Writes the artifact for a lowered program to the folder ``path``.

    Args:
        verify: compares the compiled code with the program (`compare`), on random inputs and on ``batches`` of inputs
            by function.

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
        signatures = compilation.all_signatures
        arrays = compilation.weights(signatures)
        manifest = Manifest(
            functions=compilation.signatures,
            states=compilation.states,
            target={key: value for key, value in target.to_dict().items() if key in MANIFEST_TARGET},
            versions=versions(),
            recipe=recipe,
            tuning=compilation.tuning,
            threads=threads,
        )

        def write(place: Path, manifest: Manifest) -> None:
            write_artifact(
                place,
                module=scratch / "module.so",
                weights={name: arrays[name] for f in manifest.functions.values() for name in f.weights},
                manifest=manifest,
                report=dict(report or {}),
            )

        if verify and not missing_on_host(target):
            progress("comparing with the program")
            unverified = scratch / "unverified.tersor"
            write(unverified, replace(manifest, functions=signatures))
            errors = compare_all(compilation, unverified, threads, batches)
            manifest = replace(manifest, verified=True, errors=errors)
        progress("saving")
        write(path, manifest)


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
        passes = tvm.transform.Sequential([make() for make in LOWERING_PASSES])
        executable = relax.build(
            module, llvm, relax_pipeline=passes, tir_pipeline=pipeline.PACKED, exec_mode="compiled"
        )
    except Exception as error:  # TVM raises builtin exceptions of every kind
        raise CompileError(
            "TVM could not compile the lowered program",
            why=str(error).strip().splitlines()[-1],
            fix="report it with the program (tersor inspect)",
        ) from error
    executable.export_library(str(path), fcompile=link)


def compare_all(
    compilation: Compilation, artifact: Path, threads: int | None, batches: Mapping[str, Sequence[Tensors]]
) -> dict[str, Any]:
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

    def found(name: str, function: Function) -> list[Comparison]:
        beside = compilation.observers.get(name)
        inside = None if beside is None else Observed(beside, call_of(beside.name))
        return compare(function, call_of(name), observed=inside, batches=batches.get(name, ()))

    return {name: [c.to_dict() for c in found(name, f)] for name, f in compilation.program.functions.items()}


def check_target(program: Program, target: Target) -> None:
    """Before any work: the target is one we generate code for, and holds the weights and the largest activations."""
    target.check()
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
