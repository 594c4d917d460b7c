"""Programs for ARM on devices that are folders of this machine."""

from __future__ import annotations

from pathlib import Path

_AARCH64 = b"\xb7\x00"  # e_machine of ELF


def run_under_qemu(file: Path, cpu: str) -> None:
    """Makes a program for 64-bit ARM, if the file is one, a script that runs it as on a CPU."""
    with open(file, "rb") as opened:
        head = opened.read(20)
    if head[:4] != b"\x7fELF" or head[18:20] != _AARCH64 or file.suffix == ".elf":
        return
    mode, program = file.stat().st_mode, file.with_name(f"{file.name}.elf")
    file.rename(program)
    program.chmod(0o755)
    file.write_text(f'#!/bin/sh\nexec qemu-aarch64-static -cpu {cpu} "$0.elf" "$@"\n')
    file.chmod(mode)
