"""What pip installs is what lies in the tree, and the versions that must fit each other do."""

from __future__ import annotations

import importlib
import importlib.metadata
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def packages_in_tree() -> set[str]:
    """Dotted names of all folders with Python files under the mapped folders."""
    names = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            names.add(".".join((package, *inner)))
    return names


def test_every_package_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == packages_in_tree(), "pyproject.toml: tool.setuptools.packages differs from the tree"


def test_every_package_folder_has_an_init() -> None:
    for package in packages_in_tree():
        top = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
        folder = ROOT / FOLDERS[top] / Path(*package.removeprefix(top).strip(".").split("."))
        assert (folder / "__init__.py").is_file(), f"{folder} has Python files but no __init__.py"


def test_every_data_file_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix in {".py", ".pyc"}:
                continue
            name = path.relative_to(ROOT / folder).as_posix()
            assert any(fnmatch(name, pattern) for pattern in patterns.get(package, [])), (
                f"{folder}/{name} is not in the wheel: add it to tool.setuptools.package-data"
            )


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["project"]["dependencies"], *extras) for text in group]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {pin.name: pin for pin in pins}


def test_every_dependency_has_a_tested_version_inside_its_range() -> None:
    for requirement in requirements():
        pin = constraints().get(requirement.name)
        assert pin is not None, f"constraints.txt has no tested version of {requirement.name}"
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes {version}"


@pytest.mark.parametrize("name", ["apache-tvm", "apache-tvm-ffi"])
def test_tvm_is_the_exact_pair_that_works(name: str) -> None:
    # apache-tvm 0.27.0.post1 crashes inside Schedule.tensorize with apache-tvm-ffi 0.1.15.
    wanted = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}[name]
    assert [str(r.specifier) for r in requirements() if r.name == name] == [f"=={wanted}"]
    assert importlib.metadata.version(name) == wanted


def test_the_command_line_entry_point_exists() -> None:
    module, _, function = PROJECT["project"]["scripts"]["tersor"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
