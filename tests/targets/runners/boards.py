"""A board that is a folder, reached by `fake_ssh`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.targets.runners.phones import script

FAKE = Path(__file__).with_name("fake_ssh.py")
FLAGS = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


def raspberry_pi_5(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an ssh and an scp on the path that know pi@raspberrypi; the home folder of that user."""
    tools, board = folder / "tools", folder / "board"
    for made in (tools, board / "home", board / "bin"):
        made.mkdir(parents=True)
    for name in ("ssh", "scp"):
        script(tools / name, f'exec {sys.executable} -S {FAKE} {name} "$@"')
    script(board / "bin/uname", '[ "$1" = -s ] && echo Linux || echo aarch64')
    (board / "cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {FLAGS}\n" * 4)
    monkeypatch.setenv("FAKE_BOARD", str(board))
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.delenv("TERSOR_SSH", raising=False)
    return board / "home"
