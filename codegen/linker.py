"""Links generated object files to a shared library: with a C compiler of the machine, or with zig from PyPI."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tersor.errors import CompileError

COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
FIX = "install a C compiler (gcc or clang), or: pip install ziglang"

# The oldest C library that TVM's own wheels run on.
_ZIG_TARGET = "x86_64-linux-gnu.2.28"


def command() -> list[str] | None:
    """The compiler that links: CXX, CC, one on the path, the package ziglang; None when there is none of them."""
    for variable in ("CXX", "CC"):
        words = shlex.split(os.environ.get(variable, ""))
        if words and shutil.which(words[0]):
            return words
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found:
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", _ZIG_TARGET]
    return None


def link(output: str, objects: str | Sequence[str], options: Sequence[str] | None = None) -> None:
    """Link object files to the shared library `output`; the signature is that of TVM's `fcompile`.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    compiler = command()
    if compiler is None:
        raise CompileError("there is no C compiler to link the generated code with", fix=FIX)
    files = [objects] if isinstance(objects, str) else list(objects)
    done = subprocess.run(
        [*compiler, "-shared", "-fPIC", "-o", output, *files, *(options or ())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise CompileError(
            "the generated code could not be linked",
            where=shlex.join(compiler),
            why=done.stdout.strip()[-500:] or f"exit code {done.returncode}",
            fix=FIX,
        )


link.object_format = "o"  # what TVM should write for it
