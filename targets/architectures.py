"""What an architecture fixes: its vector registers, by feature, and LLVM's name of it on each operating system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class VectorUnit:
    """Vector registers that a CPU with ``feature`` has: how many, of how many bits."""

    feature: str
    bits: int
    registers: int


@dataclass(frozen=True)
class Architecture:
    """vectors: the units that code is generated for, the widest first. triples: operating system -> LLVM's triple."""

    vectors: tuple[VectorUnit, ...]
    triples: Mapping[str, str]


ARCHITECTURES: dict[str, Architecture] = {
    "x86_64": Architecture(
        (VectorUnit("avx512", 512, 32), VectorUnit("avx2", 256, 16)),
        {
            "linux": "x86_64-linux-gnu",
            "linux-musl": "x86_64-linux-musl",
            "android": "x86_64-linux-android",
            "macos": "x86_64-apple-macosx",
            "windows": "x86_64-windows-gnu",
        },
    ),
    "aarch64": Architecture(
        (VectorUnit("neon", 128, 32),),
        {
            "linux": "aarch64-linux-gnu",
            "linux-musl": "aarch64-linux-musl",
            "android": "aarch64-linux-android",
            "ios": "arm64-apple-ios",
            "macos": "arm64-apple-macosx",
            "windows": "aarch64-windows-gnu",
        },
    ),
    "armv7a": Architecture(
        (VectorUnit("neon", 128, 16),),
        {
            "linux": "armv7a-linux-gnueabihf",
            "linux-musl": "armv7a-linux-musleabihf",
            "android": "armv7a-linux-androideabi",
        },
    ),
}
"""By the name that a target's ``arch`` gives."""

SYSTEMS: tuple[str, ...] = tuple(
    dict.fromkeys(system for arch in ARCHITECTURES.values() for system in arch.triples)
)
"""Every operating system that some architecture has a triple for; "linux" is glibc's."""
