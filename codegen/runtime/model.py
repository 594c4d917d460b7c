"""Loads an artifact and calls it.

What lowering must produce
    A Relax VM executable, exported as a shared library, with one Relax function per program function and of
    the same name (`main` is what calling the model runs).
    * Parameters: the inputs in the order of the signature, then the states and the weights in the order of
      `FunctionSignature.states` and `.weights`; all are tensors, on the CPU. States are written in place.
    * Result: a tuple of tensors in the order of `FunctionSignature.outputs`; also a single one is in a tuple. What
      follows them in the tuple is not looked at. No output is memory of a state.
    * Symbolic dimensions of the parameters are those of the signature. The function's attribute
      `tir_var_upper_bound` should give their upper bounds: memory is then planned once, and does not depend
      on the sizes that happen to come.
    * Buffers may be assumed to be aligned to 64 bytes and contiguous.
    * `relax.build(..., exec_mode="compiled")` nearly halves the VM's own time per call.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.codegen.runtime import library, threads, weights
from tersor.codegen.runtime.arguments import Arguments
from tersor.codegen.runtime.folder import map_files, new_artifact, read_manifest
from tersor.codegen.runtime.manifest import (
    FILES,
    MANIFEST,
    MODULE,
    REPORT,
    WEIGHTS,
    FunctionSignature,
    Manifest,
    read_version,
)
from tersor.codegen.runtime.outputs import Outputs
from tersor.codegen.runtime.session import Session
from tersor.errors import ArtifactError, InputError, TargetError
from tersor.targets import Target, missing_on_host

if TYPE_CHECKING:
    from tersor.codegen.runtime.benchmark import BenchmarkResult

_CPU, _POOLED = 1, 2
"""DLPack's device type of the CPU, and the VM's allocator that keeps freed buffers for the next call."""

_KEPT = 256 << 20
"""Bytes of outputs of different sizes after which the allocator is emptied."""


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, temporary: bool = False
) -> CompiledModel:
    """The compiled model in the artifact folder `path`.

    Every byte is compared with the manifest's hashes; weights are mapped, not copied. An artifact is native
    code: hashes detect damage, not malice, so load only what you trust. Its files must not be changed in place
    while it is loaded; `save` and compiling to the same path replace them instead.

    threads     as `CompiledModel.threads`
    temporary   the folder is removed when the model is no longer used

    Raises ArtifactError (missing, damaged, written by another version), TargetError (compiled for another
    CPU), InputError (threads).
    """
    folder = Path(path).absolute()
    manifest = read_manifest(folder)
    _check_versions(manifest, folder)
    _check_target(manifest, folder)
    return CompiledModel(folder, manifest, threads, temporary)


class CompiledModel:
    """A compiled model; made by `load`. Call it with the model's inputs, by name or in order.

    Inputs are numpy arrays or torch CPU tensors; the result is an `Outputs` of the same kind. A model that keeps
    state is called through a `session`. Any number of
    Python threads may call one model at the same time: each gets a VM and workers of its own, and they share
    the weights.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None, temporary: bool):
        self.path = folder
        self.manifest = manifest
        self.threads = threads
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        files = map_files(folder, manifest)
        self._report = bytes(files[REPORT])
        self._tensors = weights.read(files[WEIGHTS], str(folder / WEIGHTS))
        self._module = _load_module(folder / MODULE)
        self._lock = threading.Lock()
        self.exporter: Callable[..., Path] | None = None
        """What `export_c` calls: set by the compiler, as an artifact holds no kernels to export."""
        self.functions: Mapping[str, CompiledFunction] = {
            name: CompiledFunction(self, name, signature) for name, signature in manifest.functions.items()
        }

    @property
    def threads(self) -> int:
        """Threads that one call uses.

        What was set, else TERSOR_NUM_THREADS, else the artifact's default, else the physical cores this process
        may use. Setting None returns to the default. InputError for a number above the CPUs in the process's
        affinity mask.
        """
        return self._threads

    @threads.setter
    def threads(self, number: int | None) -> None:
        if number is None:
            self._threads = threads.default(self.manifest.threads)
        else:
            self._threads = threads.check(number, "threads")

    @property
    def main(self) -> CompiledFunction:
        """The function `main`, or the only one. Raises InputError when there are several and none is `main`."""
        if "main" in self.functions:
            return self.functions["main"]
        if len(self.functions) > 1:
            raise InputError(
                "the model has no function 'main'",
                why=f"it has {', '.join(self.functions)}",
                fix=f"name one: compiled.functions[{next(iter(self.functions))!r}](...), or by a session: "
                f"compiled.session().{next(iter(self.functions))}(...)",
            )
        return next(iter(self.functions.values()))

    @property
    def signature(self) -> FunctionSignature:
        """Inputs, outputs and dimensions of the function `main`."""
        return self.main.signature

    def session(self) -> Session:
        """A new session: the model with states of its own, all zeros."""
        return Session(self)

    @property
    def report(self) -> dict[str, Any]:
        """The report of the compilation."""
        return json.loads(self._report)

    def __call__(self, *inputs: Any, **named: Any) -> Outputs:
        """Run the model. Raises InputError when the inputs do not fit the signature, or it keeps state."""
        return self.main(*inputs, **named)

    def benchmark(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        dims: Mapping[str, int] | None = None,
        calls: int | None = None,
        threads: int | None = None,
    ) -> BenchmarkResult:
        """Time the function `main`; see `CompiledFunction.benchmark`."""
        return self.main.benchmark(inputs, dims=dims, calls=calls, threads=threads)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
        """Copy the artifact to the folder `path`, replacing an artifact there; nothing is left on failure.

        Raises ArtifactError: full disk, no permission, `path` is something else than an artifact.
        """
        names = (*FILES, MANIFEST)
        size = sum(record.size for record in self.manifest.files.values())
        with new_artifact(Path(path), size, overwrite) as folder:
            for name in names:
                with open(self.path / name, "rb") as source, open(folder / name, "wb") as copy:
                    shutil.copyfileobj(source, copy, 16 << 20)
                    copy.flush()
                    os.fsync(copy.fileno())
        return Path(path)

    def export_c(
        self, path: str | os.PathLike[str], *, name: str = "model", compiler: str | None = None
    ) -> Path:
        """Write the model as plain C to the folder `path`: header, library, weights, sources; returns the folder.

        name        begins every symbol and file name: name.h, libname.a
        compiler    a command that compiles C for the target, instead of the one that is found

        Raises ArtifactError (this model was loaded, not compiled; the folder cannot be written), InputError (the
        name), CompileError (there is no C compiler, or it fails).
        """
        if self.exporter is None:
            raise ArtifactError(
                "this model cannot be exported as C",
                where=str(self.path),
                why="it was loaded from an artifact, which holds code for this machine's runtime only",
                fix="compile it: tersor.compile(...).export_c(...), or tersor compile MODEL --export-c FOLDER",
            )
        return self.exporter(path, name=name, compiler=compiler)

    def __repr__(self) -> str:
        lines = [
            f"CompiledModel({str(self.path)!r}, target={self.manifest.target['name']!r},"
            f" threads={self.threads})"
        ]
        for name, function in self.functions.items():
            inputs = ", ".join(map(str, function.signature.inputs))
            lines.append(f"  {name}({inputs}) -> {', '.join(map(str, function.signature.outputs))}")
            if function.signature.states:
                lines.append(f"    states {', '.join(function.signature.states)}")
            lines += [f"    {d} from {low} to {high}" for d, (low, high) in function.signature.dims.items()]
        return "\n".join(lines)


class CompiledFunction:
    """One function of a compiled model."""

    def __init__(self, model: CompiledModel, name: str, signature: FunctionSignature):
        self.model, self.name, self.signature = model, name, signature
        self.arguments = Arguments(signature)
        self._names = tuple(tensor.name for tensor in signature.outputs)
        self._callers = threading.local()
        missing = sorted(set(signature.weights) - set(model._tensors))
        if missing:
            raise ArtifactError(
                "this artifact's weights are incomplete",
                where=str(model.path / WEIGHTS),
                why=f"function {name!r} needs {', '.join(missing[:8])}",
                fix="compile the model again",
            )

    def __call__(self, *inputs: Any, **named: Any) -> Outputs:
        """Run the function. Raises InputError when the inputs do not fit the signature, or it keeps state."""
        if self.signature.states:
            raise InputError(
                f"the function {self.name!r} keeps state from call to call ({', '.join(self.signature.states[:4])}"
                f"{', ...' * (len(self.signature.states) > 4)})",
                why="a compiled model holds none: its callers would share it",
                fix=f"s = compiled.session(), then s.{self.name}(...)",
            )
        return self.run(inputs, named, ())

    def run(self, inputs: Sequence[Any], named: Mapping[str, Any], states: Sequence[Any]) -> Outputs:
        """Run the function on tensors of its states, which it updates. Raises as calling it."""
        arrays, is_torch = self.arguments.bind(inputs, named)
        values = threads.run(self.model.threads, self._invoke, arrays, states)
        if is_torch:
            from_numpy = sys.modules["torch"].from_numpy
            values = [from_numpy(value) for value in values]
        return Outputs(dict(zip(self._names, values, strict=True)))

    def benchmark(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        dims: Mapping[str, int] | None = None,
        calls: int | None = None,
        threads: int | None = None,
    ) -> BenchmarkResult:
        """Time repeated calls, everything from the Python call to its result; states are zeros before each.

        inputs      by name; None makes them: floats are standard normal, integers and booleans 1 (0 where a
                    function that keeps state takes a single integer, a position most likely)
        dims        sizes of symbolic dimensions for made inputs; by default the example's, else the largest
        calls       how many calls are timed; None measures for about a second, at least 10
        threads     for this measurement only
        """
        from tersor.codegen.runtime.benchmark import measure

        return measure(self, inputs, dims or {}, calls, threads)

    def _invoke(self, arrays: list[np.ndarray], states: Sequence[Any]) -> list[np.ndarray]:
        try:
            vm = self._callers.vm
        except AttributeError:
            vm = self._callers.vm = _Machine(self)
        return vm(arrays, states)


class _Machine:
    """A Relax VM with the weights bound; used by one thread."""

    def __init__(self, function: CompiledFunction):
        model, name = function.model, function.name
        self.where = f"function {name!r} of {str(model.path)!r}"
        self.from_dlpack = library.tvm_ffi().from_dlpack
        tensors = [self.from_dlpack(model._tensors[weight]) for weight in function.signature.weights]
        self.weights = frozenset(tensor.data_ptr() for tensor in tensors)
        self.outputs = len(function.signature.outputs)
        self.shared: frozenset[int] | None = None
        self.sizes: set[int] = set()
        self.release = library.tvm_ffi().get_global_func("vm.builtin.memory_manager.clear")
        try:
            with model._lock:
                machine = model._module["vm_load_executable"]()
                machine["vm_initialization"](_CPU, 0, _POOLED)
                # The VM appends the saved arguments to those of a call, so a call passes inputs and states only.
                machine["save_function"](name, f"{name} with weights", True, *tensors)
                self.run: Callable[..., Any] = machine[f"{name} with weights"]
        except Exception as error:  # whatever TVM raises, most of it RuntimeError and AttributeError
            raise ArtifactError(
                "the artifact's module cannot be started",
                where=self.where,
                why=str(error),
                fix="compile it again",
            ) from error

    def __call__(self, arrays: list[np.ndarray], states: Sequence[Any]) -> list[np.ndarray]:
        inputs = [self._tensor(array) for array in arrays]
        try:
            results = self.run(*inputs, *states)[: self.outputs]
        except Exception as error:  # TVM raises many kinds; the inputs were right, so the artifact is not
            raise ArtifactError(
                "the compiled code failed",
                where=self.where,
                why=str(error),
                fix="if memory ran out use smaller inputs; otherwise compile the model again and report this",
            ) from error
        if self.shared is None:
            # An output that is an input or a weight itself would change under the caller's hands.
            taken = self.weights | {tensor.data_ptr() for tensor in inputs}
            self.shared = frozenset(i for i, tensor in enumerate(results) if tensor.data_ptr() in taken)
        values = [np.from_dlpack(tensor) for tensor in results]
        for index in self.shared:
            values[index] = values[index].copy()
        self._limit_memory(sum([value.nbytes for value in values]))
        return values

    def _limit_memory(self, size: int) -> None:
        """Free what the allocator keeps, now and then: it holds a freed buffer of every size that ever occurred.

        A server that meets thousands of combinations of batch and length would run out of memory.
        """
        if size not in self.sizes:
            self.sizes.add(size)
            if sum(self.sizes) > _KEPT and len(self.sizes) > 1:
                self.release()
                self.sizes = {size}

    def _tensor(self, array: np.ndarray) -> Any:
        """The array as TVM wants it; copied only if it is strided, read-only or not aligned to 64 bytes."""
        if array.flags.carray:
            tensor = self.from_dlpack(array)
            if tensor.data_ptr() % weights.ALIGNMENT == 0:
                return tensor
        return self.from_dlpack(_aligned_copy(array))


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    raw = np.empty(array.nbytes + weights.ALIGNMENT, np.uint8)
    offset = weights.padding(raw.ctypes.data)
    copy = raw[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _load_module(path: Path) -> Any:
    ffi = library.tvm_ffi()
    try:
        return ffi.load_module(str(path))
    except Exception as error:  # the loader raises RuntimeError, AttributeError and others
        raise ArtifactError(
            "the artifact's module cannot be loaded",
            where=str(path),
            why=str(error),
            fix="compile the model again",
        ) from error


def _check_versions(manifest: Manifest, folder: Path) -> None:
    made, here = manifest.versions.get("tvm", "unknown"), library.tvm_version()
    if read_version(made) != read_version(here):
        raise ArtifactError(
            "this artifact was made with another version of TVM",
            where=str(folder),
            why=f"it needs TVM {'.'.join(read_version(made))}, TVM {here} is installed",
            fix=f"compile the model again, or pip install apache-tvm=={made}",
        )


def _check_target(manifest: Manifest, folder: Path) -> None:
    target = Target.from_dict(manifest.target, str(folder / MANIFEST))
    missing = missing_on_host(target)
    if target.arch != platform.machine():
        missing = [f"the architecture {target.arch}"]
    if missing:
        raise TargetError(
            f"this artifact is for {target.name!r}, which this CPU ({platform.machine()}) cannot run",
            where=str(folder),
            why=f"the CPU lacks {', '.join(missing)}",
            fix='compile the model here (target="native"), or for "x86-64-v3", which most CPUs run',
        )
