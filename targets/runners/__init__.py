"""How hardware is reached: a program and its files go there, its output and its files come back.

    qemu[:CPU]            user-mode emulation on this machine
    adb[:SERIAL]          a phone on a cable or in the network
    ssh:[USER@]HOST[:PORT]
    local                 this machine

`connect` reads such names; every runner is a `Runner`.
"""

from __future__ import annotations

from tersor.errors import InputError
from tersor.targets.runners.adb import Adb
from tersor.targets.runners.base import Facts, Job, Result, Runner
from tersor.targets.runners.local import Local
from tersor.targets.runners.qemu import Qemu
from tersor.targets.runners.ssh import Ssh
from tersor.targets.schema import Target

__all__ = ["Adb", "Facts", "Job", "Local", "Qemu", "Result", "Runner", "Ssh", "connect"]

KINDS = "local, qemu, qemu:CPU, adb, adb:SERIAL, ssh:[USER@]HOST[:PORT]"


def connect(names: str, target: Target) -> list[Runner]:
    """The devices that a comma-separated list names, in order, each for programs that are compiled for a target.

    Nothing is asked of the devices yet, but which phones are connected.

    Raises:
        InputError: a name is of no known kind.
        DeviceError: there is no such device, or what reaches it is not installed.
    """
    return [_connect(name.strip(), target) for name in names.split(",")]


def _connect(name: str, target: Target) -> Runner:
    kind, separator, rest = name.partition(":")
    if kind == "local" and not separator:
        return Local()
    if kind == "qemu" and (rest or not separator):
        return Qemu(target, rest or None)
    if kind == "adb" and (rest or not separator):
        return Adb(rest or None)
    if kind == "ssh" and rest:
        return Ssh(rest)
    raise InputError(
        f"{name!r} names no device", fix=f"give one of {KINDS}; several with commas between them"
    )
