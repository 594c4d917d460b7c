"""Other CPUs by qemu's user-mode emulation."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

from tersor.errors import DeviceError
from tersor.targets import arm
from tersor.targets.runners.base import Facts, execute, text
from tersor.targets.runners.local import Local
from tersor.targets.schema import Target

_NAMES = {"aarch64": "aarch64", "armv7a": "arm", "x86_64": "x86_64"}
_MOST = "max"
"""What qemu calls a core with everything that it can emulate."""


class Qemu(Local):
    """Emulates one core on this machine: ``cpu``, as qemu calls it, or one like the target's own.

    That is the target's slowest core that qemu knows, else the least core with the target's features, else all that
    qemu can do.

    Raises:
        DeviceError: qemu is not installed, or does not know the core.
    """

    emulated = True
    static = True

    def __init__(self, target: Target, cpu: str | None = None):
        self._arch = target.arch
        self._qemu = find(target.arch)
        known = _cores(self._qemu)
        if cpu is not None and cpu not in known:
            raise DeviceError(
                f"{Path(self._qemu).name} knows no core {cpu!r}",
                fix=f"choose from {', '.join(sorted(known))}",
            )
        self.cpu = cpu or _like(target, known)
        self.name = f"qemu:{self.cpu}"

    def facts(self) -> Facts:
        """What is emulated; a core's own features come to light when a program uses another one."""
        return Facts((self._arch,), "Linux")

    def command(self, program: Path) -> list[str]:
        return [self._qemu, "-cpu", self.cpu, str(program)]


def find(arch: str) -> str:
    """The path of the emulator for an architecture. DeviceError when it is not installed."""
    name = f"qemu-{_NAMES.get(arch, arch)}"
    for candidate in (f"{name}-static", name):
        if found := shutil.which(candidate):
            return found
    raise DeviceError(
        f"{name} is not installed",
        fix="apt-get install qemu-user-static (Debian, Ubuntu), or your system's package",
    )


@cache
def _cores(qemu: str) -> frozenset[str]:
    """The cores that qemu knows."""
    listed = text(execute([qemu, "-cpu", "help"], timeout=30).stdout)
    return frozenset(re.findall(r"^(?:x86 )?\s*(\S+)", listed, re.MULTILINE)) - {"Available"}


def _like(target: Target, known: frozenset[str]) -> str:
    own = [cluster.core for cluster in reversed(target.clusters) if cluster.core in known]
    cores = arm.CORES.get(target.arch, {})
    enough = [core for core in cores if core in known and target.features - arm.FACTS <= cores[core]]
    return next(iter(own), None) or min(enough, key=lambda core: len(cores[core]), default=_MOST)
