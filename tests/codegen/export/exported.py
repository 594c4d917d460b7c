"""Exported models: made once for each program, loaded with the loader that comes with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np

from tersor.codegen.compiler import prepare
from tersor.codegen.export.writer import export_c
from tersor.ir import Program
from tersor.targets import Target, resolve


def export(program: Program, folder: Path, target: Target | str = "native", **options) -> Path:
    return export_c(prepare(program, resolve(target)), folder, **options)


def loader(folder: Path, name: str = "model") -> ModuleType:
    """The loader of an export, as a user's program imports it."""
    spec = importlib.util.spec_from_file_location(f"exported_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(
    program: Program, sizes: dict[str, int], seed: int = 0, function: str = "main"
) -> dict[str, np.ndarray]:
    """Random inputs: standard normal floats, ids below 10."""
    generator = np.random.default_rng(seed)
    made = {}
    for name, value in program.functions[function].inputs.items():
        shape = tuple(d if isinstance(d, int) else d.evaluate(sizes) for d in value.shape)
        if value.dtype == "float32":
            made[name] = generator.standard_normal(shape).astype(np.float32)
        else:
            made[name] = generator.integers(1, 10, shape).astype(value.dtype)
    return made
