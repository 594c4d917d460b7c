"""Phones that are folders, reached by `fake_adb`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_adb.py")
FLAGS = "fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp i8mm bf16"


class Phones:
    """An adb on the path, and the phones that it knows."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        tools = folder / "tools"
        tools.mkdir(parents=True)
        script(tools / "adb", f'exec {sys.executable} -S {FAKE} "$@"')
        self.home = folder / "phones"
        self.home.mkdir()
        monkeypatch.setenv("FAKE_ADB", str(self.home))
        monkeypatch.setenv("PATH", str(tools), prepend=":")

    def connect(
        self,
        serial: str,
        *,
        state: str = "device",
        abi: str = "arm64-v8a",
        flags: str = FLAGS,
        **more: object,
    ) -> Path:
        """Adds a phone; its temporary folder. more: free (kB), full, old, cpu: see `fake_adb`."""
        root = self.home / serial
        (root / "bin").mkdir(parents=True)
        temporary = root / "data/local/tmp"
        temporary.mkdir(parents=True)
        (root / "phone.json").write_text(json.dumps({"state": state, **more}))
        (root / "cpuinfo").write_text(
            f"processor\t: 0\nFeatures\t: {flags}\n\nprocessor\t: 1\nFeatures\t: {flags}\n"
        )
        script(root / "bin/getprop", f'[ "$1" = ro.product.cpu.abilist ] && echo {abi}')
        script(root / "bin/uname", '[ "$1" = -s ] && echo Linux || echo aarch64')
        free = more.get("free", 50_000_000)
        head = "Filesystem      1K-blocks     Used Available Use% Mounted on"
        script(
            root / "bin/df", f"echo '{head}'; echo '/dev/block/dm-44 112000000 62000000 {free}  56% /data'"
        )
        return temporary

    def asked(self, command: str) -> list[list[str]]:
        """The words after the serial of each call of a command since the last time."""
        log = self.home / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        words = map(json.loads, lines)
        return [w[3:] for w in words if w[2:3] == [command]]


def script(path: Path, text: str) -> None:
    """Writes a program that a shell runs."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
