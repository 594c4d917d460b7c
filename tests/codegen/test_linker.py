"""Which compiler links, and what it says when it cannot."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tersor.codegen import linker
from tersor.errors import CompileError


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without compilers; programs can be put into the returned folder."""
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return folder


def program(folder: Path, name: str, text: str = "exit 0") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_order_is_environment_path_zig(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert linker.command() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "ziglang" else None)
    assert linker.command()[:4] == [sys.executable, "-m", "ziglang", "cc"]
    clang = program(empty_path, "clang")
    assert linker.command() == [str(clang)]
    gcc = program(empty_path, "gcc")
    assert linker.command() == [str(gcc)]
    monkeypatch.setenv("CC", "clang --target=x86_64")
    assert linker.command() == ["clang", "--target=x86_64"]
    monkeypatch.setenv("CC", "a-compiler-that-is-not-there")
    assert linker.command() == [str(gcc)]


def test_without_a_compiler_the_error_says_what_to_install(empty_path: Path) -> None:
    with pytest.raises(CompileError, match="pip install ziglang"):
        linker.link("x.so", ["x.o"])


def test_a_failing_compiler_is_quoted(empty_path: Path) -> None:
    program(empty_path, "gcc", "echo cannot find the thing; exit 3")
    with pytest.raises(CompileError, match="cannot find the thing"):
        linker.link("x.so", "x.o")


@pytest.mark.skipif(linker.command() is None, reason="needs a C compiler")
def test_objects_become_a_library(tmp_path: Path) -> None:
    (tmp_path / "f.c").write_text("int f(int x) { return x + 1; }")
    source, compiled, library = (str(tmp_path / name) for name in ("f.c", "f.o", "f.so"))
    subprocess.run([*linker.command(), "-c", "-fPIC", "-x", "c", source, "-o", compiled], check=True)
    linker.link(library, [compiled])
    assert ctypes.CDLL(library).f(41) == 42
