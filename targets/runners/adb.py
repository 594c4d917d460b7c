"""Phones, by Android's adb.

Source: `adb help`, and adb's SERVICES.TXT and client/commandline.cpp of platform-tools 35.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from tersor.errors import DeviceError
from tersor.targets.runners.base import execute, text
from tersor.targets.runners.remote import Remote

_STATES = {
    "unauthorized": "unlock the phone and allow this computer to debug it",
    "authorizing": "wait a moment, and allow this computer on the phone",
    "offline": "plug it in again, or: adb reconnect",
    "no permissions": "this user may not open the USB device: install your system's udev rules for Android",
    "recovery": "start Android on it: adb reboot",
    "sideload": "start Android on it: adb reboot",
    "bootloader": "start Android on it: fastboot reboot",
}
_DEBUG = "connect it and switch on USB debugging in the phone's developer options; `adb devices` must list it"


class Adb(Remote):
    """The phone with this serial, or the one that is connected.

    ``adb`` is looked for on the path, then in ``platform-tools`` of ``ANDROID_HOME`` or ``ANDROID_SDK_ROOT``.

    Raises:
        DeviceError: there is no adb, no phone, several where none is named, or it is not ready.
    """

    root = "/data/local/tmp/tersor"

    def __init__(self, serial: str | None = None):
        self._adb = find()
        self.serial = self._choose(serial)
        self.name = f"adb:{self.serial}"

    def _choose(self, serial: str | None) -> str:
        done = execute([self._adb, "devices", "-l"], timeout=60)
        if done.returncode:
            raise DeviceError("adb cannot list devices", why=text(done.stderr).strip())
        states = dict(_listed(text(done.stdout)))
        shown = ", ".join(f"{name} ({state})" for name, state in states.items()) or "none"
        if serial is None:
            ready = [name for name, state in states.items() if state == "device"]
            if len(ready) > 1:
                raise DeviceError(
                    "more than one phone is connected",
                    why=shown,
                    fix=f"name one, or several: {','.join(f'adb:{name}' for name in ready)}",
                )
            serial = next(iter(ready or states), None)
        if serial is None:
            raise DeviceError("no phone is connected", fix=_DEBUG)
        if serial not in states:
            raise DeviceError(f"there is no phone {serial}", why=f"connected: {shown}", fix=_DEBUG)
        if states[serial] != "device":
            raise DeviceError(f"{serial} is {states[serial]}", fix=_STATES.get(states[serial], _DEBUG))
        return serial

    def _execute(
        self,
        script: str,
        *,
        timeout: float | None,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        command = [self._adb, "-s", self.serial, "shell", script]
        return execute(command, timeout=timeout, stdin=stdin, stdout=stdout)

    def _unreachable(self, said: str) -> DeviceError:
        return DeviceError(f"{self.name} cannot be reached", why=said or None, fix=_DEBUG)

    def _push(self, file: Path, path: str, timeout: float) -> None:
        self._transfer(["push", str(file.resolve()), path], timeout)

    def _pull(self, path: str, file: Path, timeout: float) -> None:
        self._transfer(["pull", path, str(file.resolve())], timeout)

    def _transfer(self, words: list[str], timeout: float) -> None:
        done = execute([self._adb, "-s", self.serial, *words], timeout=timeout)
        if done.returncode == 0:
            return
        said = (text(done.stderr) or text(done.stdout)).strip()
        if "No space left" in said:
            raise self._full(said)
        if re.search(r"device .*not found|device offline|no devices", said):
            raise self._unreachable(said)
        raise DeviceError(f"a file cannot be copied: adb {words[0]}", where=self.name, why=said)


def find() -> str:
    """The path of adb. DeviceError when it is not installed."""
    sdks = [os.environ.get(name) for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT")]
    places = [None, *(os.path.join(sdk, "platform-tools") for sdk in sdks if sdk)]
    for place in places:
        if found := shutil.which("adb", path=place):
            return found
    raise DeviceError(
        "adb is not installed",
        fix="install Android's platform-tools (apt-get install adb) and put adb on the path, or set ANDROID_HOME",
    )


def _listed(output: str) -> Iterable[tuple[str, str]]:
    """(serial, state) of the phones that `adb devices -l` lists."""
    _, _, listed = output.partition("List of devices attached\n")
    for line in listed.splitlines():
        if found := re.match(r"(\S+)\s+(no permissions|\S+)", line):
            yield found[1], found[2]
