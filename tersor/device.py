"""Exported models on devices: built here for the target, run there, outputs and times back."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.codegen.export.folder import WEIGHTS, Exported
from tersor.codegen.runtime.arguments import Arguments
from tersor.codegen.runtime.manifest import FunctionSignature, expressions
from tersor.errors import DeviceError, InputError, TargetError
from tersor.targets import Target, resolve
from tersor.targets.estimate import Estimate
from tersor.targets.estimate import estimate as least
from tersor.targets.runners import Job, Runner, connect

CALLS, EMULATED_CALLS, WARMUP = 30, 3, 3
"""How many calls are timed, on a device and under emulation, after how many that are not."""

TIMEOUT = 1800.0
"""Seconds that a program may take unless the caller says otherwise."""


@dataclass(frozen=True)
class DeviceTimes:
    """Times of a call on a device in milliseconds.

    sizes: of the dimensions. memory: most bytes that were resident, mapped weights included; None where the system does
    not tell. emulated: times and memory are the emulator's and say nothing about any device.
    """

    device: str
    min: float
    median: float
    calls: int
    threads: int
    sizes: Mapping[str, int]
    memory: int | None
    emulated: bool

    def __str__(self) -> str:
        at = "".join(f", {name} {size}" for name, size in self.sizes.items())
        count = (
            f"{self.calls} call{'s' * (self.calls > 1)}, {self.threads} thread{'s' * (self.threads > 1)}{at}"
        )
        memory = "" if self.memory is None or self.emulated else f", {self.memory / 1e6:.1f} MB resident"
        emulated = "; emulated: this says nothing about a device" if self.emulated else ""
        return (
            f"{self.device}: {self.median:.4g} ms median, {self.min:.4g} ms min{memory} ({count}){emulated}"
        )


class DeviceModel:
    """An exported model on one device; make it with `load_on`.

    Calling it runs the function main, or the only one: arrays by name in, a dict of numpy arrays out. Each call sends
    the program anew, the weights once; states start from zeros. bfloat16 is the bits of the numbers, as uint16.

    Attributes:
        exported: what is run. device: where. threads: how many a call uses. timeout: seconds that the program may take.
    """

    def __init__(self, exported: Exported, device: Runner, threads: int = 1, timeout: float = TIMEOUT):
        self.exported, self.device = exported, device
        self.threads, self.timeout = _count("threads", threads), timeout
        self._folder = Path(tempfile.mkdtemp(prefix="tersor-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._program: Path | None = None
        device.check(exported.target)

    def __repr__(self) -> str:
        functions = ", ".join(self.exported.functions)
        return f"DeviceModel({str(self.exported.path)!r} on {self.device.name}, functions {functions})"

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        return self.run(None, **inputs)

    def run(self, function: str | None, /, **inputs: Any) -> dict[str, np.ndarray]:
        """Runs a function by name.

        Raises:
            InputError: there is no such function, or the inputs do not fit.
            CompileError: the program cannot be built.
            DeviceError: the device cannot be reached, or the program failed there.
        """
        name, signature = _function(self.exported, function)
        with tempfile.TemporaryDirectory(prefix="tersor-") as scratch:
            sizes, file = _pack(signature, inputs, Path(scratch, "in"))
            self._execute(name, sizes, {"in": file}, ("out",), Path(scratch), f"threads={self.threads}")
            return _unpack(signature, sizes, Path(scratch, "out"))

    def benchmark(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        dims: Mapping[str, int] | None = None,
        calls: int | None = None,
        threads: int | None = None,
        function: str | None = None,
    ) -> DeviceTimes:
        """Times a function on ``inputs``, or on ones of the sizes ``dims``: by default those of the example inputs.

        Raises as `run` does.
        """
        name, signature = _function(self.exported, function)
        calls = (EMULATED_CALLS if self.device.emulated else CALLS) if calls is None else calls
        calls, threads = (
            _count("calls", calls),
            _count("threads", self.threads if threads is None else threads),
        )
        with tempfile.TemporaryDirectory(prefix="tersor-") as scratch:
            files = {}
            if inputs is None:
                sizes = _sizes(self.exported, name, dims or {})
            elif dims:
                raise InputError(
                    "inputs and dims were both given", fix="dims are for inputs that are made up"
                )
            else:
                sizes, files["in"] = _pack(signature, inputs, Path(scratch, "in"))
            words = [f"threads={threads}", f"calls={calls}", f"warmup={WARMUP}"]
            said = self._execute(name, sizes, files, (), Path(scratch), *words)
        times = re.search(r"^\w+: ([\d.]+) ms median, ([\d.]+) ms min$", said, re.MULTILINE)
        if times is None:
            raise DeviceError(
                f"the program on {self.device.name} printed no times",
                why=said.strip()[-500:],
                fix="the folder's main.c was changed: export the model again",
            )
        memory = re.search(r"^memory: (\d+) kB$", said, re.MULTILINE)
        return DeviceTimes(
            self.device.name,
            float(times[2]),
            float(times[1]),
            calls,
            threads,
            sizes,
            int(memory[1]) * 1024 if memory else None,
            self.device.emulated,
        )

    def _execute(
        self,
        function: str,
        sizes: Mapping[str, int],
        files: Mapping[str, Path],
        results: Sequence[str],
        folder: Path,
        *options: str,
    ) -> str:
        words = [WEIGHTS, f"function={self.exported.symbols[function]}", *options]
        words += [f"{dim}={size}" for dim, size in sizes.items()]
        words += [f"{name}={name}" for name in (*files, *results)]
        job = Job(self._built(), words, files, {WEIGHTS: self.exported.weights}, results)
        return self.device.run(job, folder, self.timeout).output

    def _built(self) -> Path:
        if self._program is None:
            program = self._folder / "program"
            self.exported.build(program, static=self.device.static)
            self._program = program
        return self._program


def _function(exported: Exported, name: str | None) -> tuple[str, FunctionSignature]:
    functions = exported.functions
    if name is None:
        name = "main" if "main" in functions or len(functions) > 1 else next(iter(functions))
    if name not in functions:
        raise InputError(f"there is no function {name!r}", fix=f"choose {' or '.join(functions)}")
    return name, functions[name]


def _sizes(exported: Exported, name: str, dims: Mapping[str, int]) -> dict[str, int]:
    signature = exported.functions[name]
    if unknown := sorted(set(dims) - set(signature.dims)):
        raise InputError(
            f"there is no dimension {unknown[0]!r}",
            fix=f"use {', '.join(signature.dims)}" if signature.dims else "leave it out: all sizes are fixed",
        )
    sizes = {**exported.usual[name], **dims}
    arguments = Arguments(signature)
    arguments.dimensions(arguments.shapes(sizes))
    return sizes


def _count(name: str, number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InputError(f"{name}={number!r} cannot be", fix="give a whole number above 0")
    return number


def load_on(
    path: str | os.PathLike[str], device: str | Runner, *, threads: int = 1, timeout: float = TIMEOUT
) -> DeviceModel:
    """An exported model (the folder of ``export_c``) on a device, to be called and timed there.

    Args:
        device: "qemu" or "qemu:CPU" (emulation), "adb" or "adb:SERIAL" (a phone), "ssh:[USER@]HOST[:PORT]", "local";
            or a runner of your own.
        threads: how many a call uses.
        timeout: seconds that the program may take there.

    Raises:
        ArtifactError: the folder holds no exported model.
        InputError: the device's name is of no known kind.
        TargetError: the device cannot run what the model was compiled for.
        DeviceError: the device cannot be reached.
    """
    exported = Exported.read(Path(path))
    runners = connect(device, exported.target) if isinstance(device, str) else [device]
    if len(runners) != 1:
        raise InputError(f"{device!r} names several devices", fix="load the model on each of them")
    return DeviceModel(exported, runners[0], threads, timeout)


def estimate(
    path: str | os.PathLike[str],
    *,
    target: str | Target | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int = 1,
    function: str | None = None,
) -> Estimate:
    """The least time that a call of an exported model can take on a target, by what is known about its cores.

    No measurement: see `tersor.targets.estimate` for what counts.

    Args:
        target: a name that ``tersor targets`` lists, or a description; what the model was compiled for by default.
        dims: sizes, by default those of the example inputs.

    Raises:
        ArtifactError: the folder holds no exported model.
        InputError: there is no such function or dimension, or the target has fewer cores than threads.
        TargetError: too little is known about the target, or the model was compiled for another architecture.
    """
    exported = Exported.read(Path(path))
    found = resolve(exported.target.name if target is None else target)
    if found.arch != exported.target.arch:
        raise TargetError(
            f"no estimate for {found.name!r}", why=f"the model is compiled for {exported.target.arch}"
        )
    name, _ = _function(exported, function)
    code = replace(found, features=found.features & exported.target.features)
    work = exported.work(name, _sizes(exported, name, dims or {}))
    return least(work, code, _count("threads", threads))


def _pack(signature: FunctionSignature, inputs: Mapping[str, Any], file: Path) -> tuple[dict[str, int], Path]:
    """Checks inputs and writes their elements one after the other; the sizes that they have."""
    arguments = Arguments(signature)
    arrays, _ = arguments.bind((), inputs)
    with open(file, "wb") as opened:
        for array in arrays:
            opened.write(np.ascontiguousarray(array).tobytes())
    return arguments.dimensions([array.shape for array in arrays]), file


def _unpack(signature: FunctionSignature, sizes: Mapping[str, int], file: Path) -> dict[str, np.ndarray]:
    found, content, at = {}, file.read_bytes(), 0
    for tensor in signature.outputs:
        shape = [d if isinstance(d, int) else d.evaluate(sizes) for d in expressions(tensor)]
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if at + count * dtype.itemsize > len(content):
            raise DeviceError(
                "the program wrote fewer outputs than it has",
                fix="export the model again: main.c was changed",
            )
        found[tensor.name] = np.frombuffer(content, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    return found
