"""The rules about who may import whom, read from the source and checked at run time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tersor", "frontends", "ir", "passes", "codegen", "targets")

MAY_IMPORT = {
    "frontends": {"ir"},
    "ir": set(),
    "passes": {"ir", "targets"},
    "codegen": {"ir", "targets"},
    "targets": set(),
}
"""Room -> other rooms it may import, beside itself and `SHARED`; `tersor/` may import all."""


SHARED = {"errors", "folders"}
"""Modules of `tersor/` that every room may import: they need nothing but the standard library."""


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in the source, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from tersor import targets` imports the module tersor.targets.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base == "tersor" else base


def violations(path: str, source: str) -> list[str]:
    """Broken rules of one file; `path` is relative to the root, with forward slashes."""
    room = path.split("/")[0]
    in_runtime = path.startswith("codegen/runtime/")
    found = []
    for line, module in imported_modules(source):
        parts = module.split(".")
        if module.startswith("."):
            found.append(f"{path}:{line}: relative import; write `from tersor.{room}...`")
        elif parts[0] in ROOMS[1:]:
            found.append(f"{path}:{line}: `{module}` without the prefix; write `tersor.{module}`")
        elif parts[0] == "tvm" and (room in ROOMS and room != "codegen" or in_runtime):
            found.append(f"{path}:{line}: only codegen, and not its runtime, imports tvm")
        elif in_runtime and (parts[0] == "torch" or parts[:2] == ["tersor", "ir"]):
            found.append(f"{path}:{line}: the runtime imports neither torch nor the program representation")
        elif parts[0] == "tersor" and room in MAY_IMPORT:
            other = parts[1] if len(parts) > 1 else ""
            if other not in {room} | SHARED | MAY_IMPORT[room]:
                found.append(f"{path}:{line}: room {room} must not import `{module}`")
    return found


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_import_follows_the_rules() -> None:
    found = []
    files = source_files(*ROOMS, "benchmarks", "tests", "examples")
    for path in files:
        found += violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert len(files) > 20
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("passes/fold.py", "import tvm"),
        ("tersor/api.py", "def f():\n    from tvm import relax"),
        ("codegen/runtime/vm.py", "import tvm.ffi"),
        ("codegen/runtime/vm.py", "import torch"),
        ("codegen/runtime/vm.py", "from tersor.ir.dims import Dim"),
        ("passes/fold.py", "import ir"),
        ("tests/ir/test_dims.py", "from ir.dims import Dim"),
        ("ir/graph.py", "from .dims import Dim"),
        ("ir/graph.py", "from tersor.passes import Pass"),
        ("ir/graph.py", "from tersor import targets"),
        ("targets/registry.py", "from tersor.ir import Program"),
        ("frontends/export.py", "import tersor.codegen"),
        ("passes/fold.py", "import tersor"),
        ("codegen/lower.py", "from tersor.passes.manager import Manager"),
    ],
)
def test_a_broken_rule_is_reported(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "passes/fold.py",
            "import torch\nfrom tersor.ir import Program\nfrom tersor.errors import TersorError",
        ),
        (
            "codegen/lower.py",
            "import tvm\nfrom tersor import ir, targets\nfrom tersor.codegen.kernels import base",
        ),
        ("codegen/runtime/vm.py", "import tvm_ffi\nimport numpy\nfrom tersor.targets import resolve"),
        ("tersor/api.py", "from tersor.passes import Pipeline\nfrom tersor.codegen import compile_program"),
        ("tests/codegen/test_gemm.py", "import tvm"),
    ],
)
def test_an_allowed_import_is_not_reported(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_no_name_hides_a_module() -> None:
    """Where a package exports a function ``cost`` from its module ``cost``, ``tersor.ir.cost`` is never the module."""
    hidden = []
    packages = source_files(*ROOMS)
    for path in packages:
        if path.name != "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                name = alias.asname or alias.name
                if node.module.endswith(f".{name}") and (path.parent / f"{name}.py").exists():
                    hidden.append(f"{path.relative_to(ROOT)}: {name}")
    assert len(packages) > 20
    assert not hidden, hidden


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tersor", {"torch", "tvm", "tvm_ffi"}),
        ("import tersor; tersor.targets.resolve", {"torch", "tvm", "tvm_ffi"}),
        ("import tersor.cli", {"torch", "tvm", "tvm_ffi"}),
        ("import tersor.codegen.runtime", {"torch", "tvm", "tersor.ir"}),
    ],
)
def test_importing_loads_only_what_is_needed(statement: str, absent: set[str], tmp_path: Path) -> None:
    script = f"import sys; {statement}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "tersor" in result.stdout.split()
    assert not absent & set(result.stdout.split())
