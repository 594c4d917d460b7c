"""Targets by name: the catalog that ships with Tersor, this machine as `native`, a user's own TOML file."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from pathlib import Path

from tersor.errors import TargetError
from tersor.targets import x86
from tersor.targets.architectures import SYSTEMS
from tersor.targets.detect import host_llvm_features, native
from tersor.targets.schema import NUMBERS, Target

CATALOG = Path(__file__).parent / "catalog"


@cache
def catalog() -> dict[str, Target]:
    """The targets that ship with Tersor, by name."""
    targets = [Target.from_toml(path) for path in sorted(CATALOG.glob("*.toml"))]
    return {target.name: target for target in targets}


def names() -> list[str]:
    """Every name that `resolve` accepts, `native` first."""
    return ["native", *catalog()]


def resolve(name: str | Target) -> Target:
    """The target called `name`: "native", a name of the catalog, or the path of a `.toml` file.

    ``NAME:SYSTEM`` is the same machine with another operating system, e.g. "armv8-a:android".
    A Target is returned as it is.

    Raises TargetError, with the nearest names and the whole list, for anything else.
    """
    if isinstance(name, Target):
        return name
    if not isinstance(name, str):
        raise TargetError(
            f"a target is a name or a Target, not {type(name).__name__}",
            fix=f"pass one of {', '.join(names())}",
        )
    if name == "native":
        return native()
    if name in catalog():
        return catalog()[name]
    if name.endswith(".toml"):
        return Target.from_toml(name)
    machine, _, system = name.rpartition(":")
    if machine in catalog() and system in SYSTEMS:
        return replace(catalog()[machine], name=name, os=system)
    near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise TargetError(
        f"unknown target {name!r}",
        fix=f"{hint}known targets: {', '.join(names())}, each also as NAME:SYSTEM with one of {', '.join(SYSTEMS)}; "
        "or the path of a .toml file describing one",
    )


def required_features(target: Target) -> frozenset[str]:
    """LLVM features that code compiled for `target` may use, so a CPU must have them all to run it."""
    enabled = {attribute[1:] for attribute in target.mattr if attribute.startswith("+")}
    disabled = {attribute[1:] for attribute in target.mattr if attribute.startswith("-")}
    return frozenset((x86.LEVELS.get(target.mcpu or "", frozenset()) | enabled) - disabled)


def missing_on_host(target: Target) -> list[str]:
    """What this machine (CPU, then system) lacks to run code compiled for `target`; empty when it can run it."""
    host = host_llvm_features()
    if target.arch != "x86_64" or not host:
        return [f"a CPU of architecture {target.arch}"]
    if target.os not in (None, "linux", "linux-musl"):
        return [f"the system {target.os}"]
    return sorted(required_features(target) - host)


def check_memory(target: Target, needed_bytes: int, what: str) -> None:
    """TargetError when `what` needs more bytes than the target has; a target of unknown memory passes."""
    if target.memory is not None and needed_bytes > target.memory:
        raise TargetError(
            f"{what} needs {size(needed_bytes)}, the target {target.name!r} has {size(target.memory)}",
            where=f"memory of {target.name!r}: {target.sources['memory']}",
            fix="use a smaller model, batch or length, a recipe that shrinks it, or a bigger target",
        )


def describe(target: Target) -> str:
    """A readable page about a target: what it is and where each number comes from."""
    rows = [
        ("architecture", f"{target.arch}, {target.os or 'any system'}", ""),
        ("LLVM cpu", target.mcpu or "-", ""),
        ("features", ", ".join(sorted(target.features)) or "-", target.sources.get("features", "")),
        ("vectors", f"{target.vector_registers} registers of {target.vector_bits} bits", ""),
    ]
    for i, cluster in enumerate(target.clusters):
        rows.append(("" if i else "core types", str(cluster), "" if i else target.sources["clusters"]))
    for key in NUMBERS:
        value = getattr(target, key)
        text = "unknown" if value is None else _TEXTS.get(key, size)(value)
        rows.append((_LABELS[key], text, target.sources.get(key, "")))
    wide = max(len(text) for label, text, _ in rows if label != "features")
    lines = [f"{label:<14}{text:<{wide}}  {source}".rstrip() for label, text, source in rows]
    flags = [attribute for attribute in target.mattr if attribute.startswith("+")]
    return "\n".join(
        [target.name, *(f"  {line}" for line in lines), f"  {'LLVM features':<14}{' '.join(flags) or '-'}"]
    )


_LABELS = {
    "cores": "cores",
    "l1d": "L1 data",
    "l2": "L2 per core",
    "l3": "L3 shared",
    "memory": "memory",
    "bandwidth": "bandwidth",
}
_TEXTS = {"cores": str, "bandwidth": lambda value: f"{value / 1e9:.4g} GB/s"}


def size(count: int) -> str:
    """Bytes as text with a binary unit: 3.1 GiB, 512 KiB, 12 B."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
