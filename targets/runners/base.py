"""What every runner does, and what is known about a device once it was asked."""

from __future__ import annotations

import re
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tersor.errors import DeviceError, TargetError
from tersor.targets import arm, x86
from tersor.targets.registry import required_features
from tersor.targets.schema import Target

_ARCHITECTURES = {
    "arm64": "aarch64",
    "arm64-v8a": "aarch64",
    "armeabi-v7a": "armv7a",
    "armv7l": "armv7a",
    "armv8l": "armv7a",
    "amd64": "x86_64",
}
"""What `uname -m` and Android call architectures -> what targets do."""

_SYSTEMS = {"Linux": ("linux", "linux-musl", "android"), "Darwin": ("macos",)}
"""What `uname -s` prints -> systems of targets whose programs, linked statically on Linux, run there."""

_ARM_FLAGS = {
    "aarch64": {"neon": "asimd", "fp16": "asimdhp", "dotprod": "asimddp", "i8mm": "i8mm", "bf16": "bf16"},
    "armv7a": {"neon": "neon", "fma": "vfpv4"},
}
"""Feature of a target -> flag in /proc/cpuinfo. Source: Linux, Documentation/arch/arm64/elf_hwcaps.rst."""


@dataclass(frozen=True)
class Job:
    """A program to run on a device, in a fresh folder there.

    program: the executable file. arguments: its own; names of files are relative to that folder. files: name there ->
    file here. kept: the same for large files, which stay on the device for the next time. results: names of files that
    the program writes.
    """

    program: Path
    arguments: Sequence[str] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    kept: Mapping[str, Path] = field(default_factory=dict)
    results: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """What a program that ended well printed."""

    output: str
    errors: str


@dataclass(frozen=True)
class Facts:
    """What a device says about itself.

    architectures: those it runs programs for, its own first. system: as `uname -s` calls it. flags: those of
    /proc/cpuinfo, None where it has none.
    """

    architectures: tuple[str, ...]
    system: str
    flags: frozenset[str] | None = None

    @classmethod
    def read(cls, machine: str, system: str, cpuinfo: str) -> Facts:
        """machine: words such as `uname -m` prints, or Android's list of ABIs. cpuinfo: the text of that file."""
        names = [_ARCHITECTURES.get(name, name) for name in re.split(r"[\s,]+", machine.strip())]
        if (
            machine.strip() == "aarch64"
        ):  # from uname: most such CPUs run 32-bit programs as well; one that cannot says so
            names.append("armv7a")
        found = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
        # a thread may run on any core, so what counts is what all of them have
        flags = frozenset.intersection(*(frozenset(line.split()) for line in found)) if found else None
        return cls(tuple(dict.fromkeys(names)), system.strip() or "Linux", flags)

    def missing(self, target: Target) -> list[str]:
        """What the device lacks to run a program for a target: its architecture, its system or features."""
        if target.arch not in self.architectures:
            return [f"the architecture {target.arch}"]
        if (target.os or "linux") not in _SYSTEMS.get(self.system, ()):
            return [f"the system {target.os}"]
        if self.flags is None:
            return []
        if target.arch == "x86_64":
            needed = {name: x86.LLVM_FEATURES[name] for name in required_features(target)}
        elif self.architectures[0] != target.arch:
            return []  # the flags are those of 64-bit programs
        else:
            known = _ARM_FLAGS[target.arch]
            needed = {name: known[name] for name in target.features - arm.FACTS}
        return sorted(name for name, flag in needed.items() if flag not in self.flags)


class Runner(ABC):
    """A device that programs can be run on.

    Attributes:
        name: as `connect` takes it.
        emulated: time and memory that are measured there say nothing about a device.
        static: programs should bring their C library.
    """

    name: str
    emulated = False
    static = True

    def check(self, target: Target) -> None:
        """TargetError when programs for a target cannot run there; DeviceError when the device cannot be reached."""
        facts = self.facts()
        if missing := facts.missing(target):
            raise TargetError(
                f"a program for {target.name!r} cannot run on {self.name}",
                why=f"the device lacks {', '.join(missing)}; it is {facts.system} on {facts.architectures[0]}",
                fix="compile for this device (--target), or choose another one" + self._elsewhere(target),
            )

    def _elsewhere(self, target: Target) -> str:
        return (
            ""
            if self.emulated or (target.os or "linux") not in _SYSTEMS["Linux"]
            else "; --device qemu emulates it"
        )

    @abstractmethod
    def facts(self) -> Facts:
        """What the device is. DeviceError when it cannot be reached."""

    @abstractmethod
    def run(self, job: Job, folder: Path, timeout: float | None = None) -> Result:
        """Runs a program; the files it writes come back to ``folder``. On the device nothing is left but `Job.kept`.

        Raises:
            DeviceError: the device cannot be reached or is full; the program failed, was killed, or took longer than
                ``timeout`` seconds.
        """

    def ended(self, status: int, output: str, errors: str) -> Result:
        """The result of a program; DeviceError for an exit status but 0 (as a shell has it: signals are 128 + n)."""
        if status == 0:
            return Result(output, errors)
        said = "\n".join(text.strip()[-2000:] for text in (errors, output) if text.strip())
        if status <= 128:
            raise DeviceError(
                f"the program failed on {self.name}: exit status {status}",
                why=said or None,
                fix=_CANNOT_START.get(status, "see what it says; inputs and sizes must fit the model"),
            )
        try:
            name = signal.Signals(status - 128).name
        except ValueError:
            name = f"signal {status - 128}"
        raise DeviceError(
            f"the program was killed on {self.name}: {name}",
            why=said or None,
            fix=_SIGNALS.get(name, _REPORT),
        )


_REPORT = "report it with the exported folder"
_SIGNALS = {
    "SIGILL": "the core lacks an instruction that the program has: compile for the device (--target NAME; "
    "`tersor targets` lists them)",
    "SIGKILL": "the device stopped it, most likely for its memory: a smaller model, batch or length, fewer threads",
}
_CANNOT_START = {
    126: "the program cannot be started there: its architecture is another one, or the folder's disk is mounted noexec"
}


def execute(
    command: Sequence[str],
    *,
    timeout: float | None,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command here. DeviceError when it cannot be started or takes longer than ``timeout`` seconds."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE,
            timeout=timeout,
            cwd=cwd,
        )
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be started", why=str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"{Path(command[0]).name} did not end within {timeout:g} seconds",
            fix="see that the device answers; fewer calls and smaller sizes take less, timeout= gives it longer",
        ) from error


def text(found: bytes | None) -> str:
    return (found or b"").decode("utf-8", "replace").replace("\r\n", "\n")
