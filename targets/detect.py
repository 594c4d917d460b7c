"""The `native` target: what this machine is, read from Linux's own files. Nothing is executed or measured."""

from __future__ import annotations

import math
import os
import platform
import re
from functools import cache
from pathlib import Path

from tersor.errors import TargetError
from tersor.targets import x86
from tersor.targets.schema import Target

_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2^63; no machine has an exbibyte."""


@cache
def native() -> Target:
    """The machine this process runs on, within its CPU affinity and control-group limits (read once).

    Raises TargetError on anything but Linux on an x86-64 CPU with AVX2 and FMA.
    """
    return detect(
        Path("/"),
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        platform.machine(),
        platform.system(),
    )


def detect(root: Path, affinity: list[int], machine: str, system: str) -> Target:
    """Describe the machine whose /proc and /sys lie under `root`, for a process bound to `affinity`."""
    if system != "Linux" or machine != "x86_64":
        raise TargetError(
            f"this machine ({system} on {machine}) is not one that Tersor can describe as 'native'",
            why="this version generates code for Linux on x86-64",
            fix="name a target instead; `tersor targets` lists them",
        )
    cpu = _cpuinfo(root)
    features = _llvm_features(cpu)
    missing = sorted(x86.LEVELS["x86-64-v3"] - set(features))
    if missing:
        raise TargetError(
            f"this CPU ({cpu.get('model name', 'unknown')}) lacks instructions that Tersor's kernels need",
            why=f"missing: {', '.join(missing)}",
            fix="use a CPU of level x86-64-v3 or newer (Intel Haswell, AMD Zen)",
        )
    mcpu = x86.cpu_name(
        cpu.get("vendor_id", ""), int(cpu.get("cpu family", 0)), int(cpu.get("model", 0)), features
    )
    mattr = tuple(("+" if name in features else "-") + name for name in x86.LLVM_FEATURES)
    if "avx512f" in features:
        # Several Intel CPU names, and the psABI level, make LLVM split plain loops into 256-bit halves.
        mattr += ("-prefer-256-bit",)

    numbers, sources = {}, {}
    cores, why = _cores(root, affinity)
    numbers["cores"], sources["cores"] = cores, why
    for key, size, why in _caches(root, affinity):
        numbers[key], sources[key] = size, why
    memory, why = _memory(root)
    if memory:
        numbers["memory"], sources["memory"] = memory, why
    sources["features"] = "/proc/cpuinfo"
    return Target(
        name="native",
        arch="x86_64",
        mcpu=mcpu,
        mattr=mattr,
        features=x86.feature_names(features),
        os="linux",
        sources=sources,
        **numbers,
    )


@cache
def host_llvm_features() -> frozenset[str]:
    """LLVM features of the CPU this process runs on; empty where it is not x86-64 Linux."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    return frozenset(_llvm_features(_cpuinfo(Path("/"))))


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    path = root / "proc/cpuinfo"
    try:
        block = path.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")[0]
    except OSError as error:
        raise TargetError(
            "this machine's CPU cannot be identified",
            where=str(path),
            why=str(error),
            fix="name a target instead; `tersor targets` lists them",
        ) from error
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _llvm_features(cpu: dict[str, str]) -> list[str]:
    flags = set(cpu.get("flags", "").split())
    return [name for name, flag in x86.LLVM_FEATURES.items() if flag in flags]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _cpu_list(text: str | None) -> set[int]:
    """Parse Linux's list format: "0-3,8" -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in (text or "").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _core_of(root: Path, cpu: int) -> int:
    """The lowest-numbered hardware thread of the same physical core names the core."""
    siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return min(_cpu_list(siblings), default=cpu)


def _cores(root: Path, affinity: list[int]) -> tuple[int, str]:
    cores = len({_core_of(root, cpu) for cpu in affinity}) or 1
    why = "physical cores in this process's CPU affinity (sched_getaffinity, /sys/devices/system/cpu)"
    quotas = []
    for folder in _cgroups(root, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota, period = (
                _read(folder / "cpu.cfs_quota_us") or "",
                _read(folder / "cpu.cfs_period_us") or "",
            )
        if quota.isdigit() and period.isdigit():
            quotas.append(math.ceil(int(quota) / int(period)))
    if quotas and min(quotas) < cores:
        return max(1, min(quotas)), "CPU quota of this process's control group"
    return cores, why


def _caches(root: Path, affinity: list[int]) -> list[tuple[str, int, str]]:
    """(field, bytes, source) of the first usable CPU's data caches; L1 and L2 per core."""
    found = []
    for folder in sorted(
        root.glob(f"sys/devices/system/cpu/cpu{affinity[0] if affinity else 0}/cache/index*")
    ):
        level, kind, size = (_read(folder / name) or "" for name in ("level", "type", "size"))
        unit = re.fullmatch(r"(\d+)([KM])", size)
        key = {"1": "l1d", "2": "l2", "3": "l3"}.get(level)
        if unit is None or key is None or kind not in ("Data", "Unified"):
            continue
        size_bytes = int(unit[1]) * {"K": 1 << 10, "M": 1 << 20}[unit[2]]
        if key != "l3":
            sharing = {_core_of(root, cpu) for cpu in _cpu_list(_read(folder / "shared_cpu_list"))}
            size_bytes //= max(1, len(sharing))
        if size_bytes:
            found.append((key, size_bytes, f"/{folder.relative_to(root)}"))
    return found


def _memory(root: Path) -> tuple[int | None, str]:
    limits = []
    total = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "")
    if total:
        limits.append((int(total[1]) << 10, "MemTotal in /proc/meminfo"))
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name) or ""
            if text.isdigit() and 0 < int(text) < _UNLIMITED:
                limits.append((int(text), f"/{(folder / name).relative_to(root)}"))
    return min(limits, default=(None, ""))


def _cgroups(root: Path, controller: str) -> list[Path]:
    """This process's control group and its ancestors (v2, or v1's `controller`): each may set a limit."""
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may name a folder of the host; then the mount itself holds the limit.
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]
