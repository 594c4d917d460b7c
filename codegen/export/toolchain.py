"""C compilers for targets: one that the caller names, one of the machine, the NDK's, or zig from PyPI."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tersor.codegen import linker
from tersor.errors import CompileError
from tersor.targets import Target

FIX = "pip install ziglang (a C compiler for every Linux, macOS and Windows), or name one: compiler="

_ZIG_ARCHITECTURES = {"armv7a": "arm"}
_ZIG_SYSTEMS = {"linux": "linux-gnu", "linux-musl": "linux-musl", "macos": "macos", "windows": "windows-gnu"}
_GLIBC = ".2.28"
"""The oldest C library that what we link runs on: Debian 10, Ubuntu 18.10, RHEL 8."""

ANDROID_API = 24
"""Android 7; older phones have no 64-bit ARM code to lose."""

PAGES_OF_16_KB = "-Wl,-z,max-page-size=16384"
"""What makes a shared library fit for Android on such memory pages; NDKs from 28 on do it by themselves."""

_NO_UNWINDING = ("-fno-asynchronous-unwind-tables", "-fno-unwind-tables")
"""Leaves out what exceptions and debuggers unwind stacks by, in the C library too: 12 kB of a static program. It has
neither exceptions nor names for a debugger."""

_C = ("-std=c99", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic")

_ANYWHERE = "-fPIC"
"""Code for libraries. Static programs do without: zig builds its C library, a minute's work, for either kind of code,
and this way it is the one that a user's plain ``zig cc`` links with."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler driver for one target; make it with `toolchain`.

    command: what runs it. archiver: what makes static libraries. options: what every call is given.
    system: the target's operating system.
    """

    command: tuple[str, ...]
    archiver: tuple[str, ...]
    options: tuple[str, ...]
    system: str

    def compile(self, source: Path, output: Path, options: Iterable[str] = ()) -> None:
        """One C file to an object file."""
        flags = [*self.options, *_C, _ANYWHERE, *options]
        self._run([*self.command, *flags, "-c", str(source), "-o", str(output)])

    def archive(self, objects: Sequence[Path], output: Path) -> None:
        """Object files to a static library."""
        output.unlink(missing_ok=True)
        self._run([*self.archiver, "rcsD", str(output), *map(str, objects)])

    def link(
        self,
        inputs: Sequence[Path],
        output: Path,
        *,
        shared: bool = False,
        static: bool = False,
        options: Iterable[str] = (),
    ) -> None:
        """C files, object files and libraries to a program, or a shared library; without debug information.

        static: a program that needs nothing, the C library included. Beside a DLL lies what programs are linked
        with to load it: ``libNAME.dll.a``.
        """
        flags = [
            "-static" if static else _ANYWHERE,
            *["-shared"] * shared,
            *["-s"] * (self.system != "macos"),
        ]
        if shared and self.system == "windows":
            flags.append(f"-Wl,--out-implib,{output.with_name(f'lib{output.stem}.dll.a')}")
        flags += [PAGES_OF_16_KB] * (self.system == "android" and shared)
        libraries = [] if self.system == "windows" else ["-lm", "-lpthread"]
        files = map(str, inputs)
        self._run(
            [*self.command, *self.options, *_C, *flags, *options, *files, "-o", str(output), *libraries]
        )

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode:
            raise CompileError(
                "a C compiler failed",
                where=shlex.join(command),
                why=done.stdout.strip()[-2000:] or f"exit code {done.returncode}",
                fix="check that it makes code for the target, or take another one: " + FIX,
            )


def toolchain(target: Target, compiler: str | None = None, *, static: bool = False) -> Toolchain:
    """The compiler for a target: ``compiler`` (a command line) if given, else the first of

    * for this machine's architecture and system: that of ``CC``, or one on the path;
    * for Linux elsewhere: a cross compiler on the path, such as aarch64-linux-gnu-gcc;
    * for Android: the NDK that ``ANDROID_NDK_HOME`` names;
    * the package ziglang.

    static: programs are to be linked statically; on Linux with musl, where zig does it.

    Raises:
        CompileError: there is none.
    """
    system = target.os or "linux"
    if compiler is not None:
        words = shlex.split(compiler)
        if not words or shutil.which(words[0]) is None:
            raise CompileError(
                f"there is no C compiler {compiler!r}", fix="give the path of one, and its options"
            )
        return _ordinary(words, system)
    if (
        system == "linux"
        and target.arch == platform.machine()
        and platform.system() == "Linux"
        and not static
    ):
        words = linker.command()
        if words and "ziglang" not in words:
            return _ordinary(_c_driver(words), system)
    if system == "linux" and (cross := shutil.which(f"{target.llvm_triple}-gcc")):
        return _ordinary([cross], system)
    if system == "android" and (ndk := _ndk(target)):
        return _ordinary([str(ndk)], system)
    zig_system = _ZIG_SYSTEMS.get("linux-musl" if static and system in ("linux", "android") else system)
    if zig_system is not None and importlib.util.find_spec("ziglang") is not None:
        return _zig(target, zig_system, system, static)
    raise CompileError(
        f"there is no C compiler for target {target.name!r}",
        why=f"it runs {system} on {target.arch}",
        fix="set ANDROID_NDK_HOME, or build the exported sources in Xcode or Gradle"
        if system in ("android", "ios")
        else FIX,
    )


def _c_driver(words: list[str]) -> list[str]:
    """The linker may be a C++ compiler; its C compiler lies beside it."""
    names = {"g++": "gcc", "clang++": "clang", "c++": "cc"}
    folder, name = os.path.split(words[0])
    return [os.path.join(folder, names.get(name, name)), *words[1:]]


def _ordinary(words: Sequence[str], system: str) -> Toolchain:
    """gcc or clang; its archiver has its name (aarch64-linux-gnu-ar), is the NDK's, or is that of the machine."""
    folder, name = os.path.split(words[0])
    prefix = name.rpartition("-")[0]
    candidates = [os.path.join(folder, f"{prefix}-ar"), os.path.join(folder, "llvm-ar"), "ar"]
    archiver = next((found for c in candidates if c != "-ar" and (found := shutil.which(c))), None)
    if archiver is None:
        raise CompileError("there is no archiver (ar) beside the C compiler", where=words[0], fix=FIX)
    return Toolchain(tuple(words), (archiver,), (), system)


def _zig(target: Target, zig_system: str, system: str, static: bool) -> Toolchain:
    zig = (sys.executable, "-m", "ziglang")
    arch = _ZIG_ARCHITECTURES.get(target.arch, target.arch)
    triple = f"{arch}-{zig_system}"
    # without -fno-sanitize and -g0 zig adds UBSan's traps and debug information
    options = ["-fno-sanitize=all", "-g0"]
    if arch == "arm":
        triple += "eabi" if system == "android" else "eabihf"  # how floats are passed, as in the kernels
        options.append("-mcpu=cortex_a8")  # the least with NEON
    if static and zig_system == "linux-musl":
        options += _NO_UNWINDING
    if zig_system == "linux-gnu":
        triple += _GLIBC
    return Toolchain((*zig, "cc", "-target", triple), (*zig, "ar"), tuple(options), system)


def _ndk(target: Target) -> Path | None:
    home = os.environ.get("ANDROID_NDK_HOME")
    if not home:
        return None
    name = f"{target.llvm_triple}{ANDROID_API}-clang"
    return next(iter(sorted(Path(home, "toolchains/llvm/prebuilt").glob(f"*/bin/{name}"))), None)
