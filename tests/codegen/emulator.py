"""Runs programs for other CPUs under qemu's user mode."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tersor.targets import Target

_NAMES = {"aarch64": "aarch64", "armv7a": "arm", "x86_64": "x86_64"}


def run(program: Path, target: Target, *arguments: str, cpu: str = "max", timeout: float = 120) -> str:
    """What a program prints; on another architecture it is run as on ``cpu``, or the test is skipped without qemu."""
    command = [str(program), *arguments]
    if target.arch != platform.machine():
        qemu = f"qemu-{_NAMES[target.arch]}-static"
        if shutil.which(qemu) is None:
            pytest.skip(f"needs {qemu}: apt-get install qemu-user-static")
        command = [qemu, "-cpu", cpu, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
