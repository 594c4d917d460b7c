"""Writes a compiled model as C: the folder that users build into their programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tvm.target.codegen import llvm_version_major

from tersor.codegen.artifact import weight_blocks
from tersor.codegen.compiler import MANIFEST_TARGET, Compilation, versions
from tersor.codegen.export import SOURCES, example, source, work
from tersor.codegen.export.apps import app_files
from tersor.codegen.export.apps.app import App
from tersor.codegen.export.folder import COMPILED, KERNELS, SIGNATURE, WEIGHTS
from tersor.codegen.export.functions import PlainKernel
from tersor.codegen.export.memory import rounded
from tersor.codegen.export.objects import object_code
from tersor.codegen.export.plan import plan
from tersor.codegen.export.source import Field, Interface
from tersor.codegen.export.toolchain import Toolchain, toolchain
from tersor.codegen.runtime.folder import check_place
from tersor.codegen.runtime.manifest import TensorType
from tersor.codegen.runtime.weights import header, padding
from tersor.errors import ArtifactError, CompileError, InputError
from tersor.folders import new_folder
from tersor.ir import Program
from tersor.targets import Target

_STATIC = ("internal.h", "model.c", "threads.c", "threads.h")
_LIBRARIES = {"windows": "{}.dll", "macos": "lib{}.dylib"}


def export_c(
    compilation: Compilation,
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    compiler: str | None = None,
    recipe: str = "custom",
    progress: Callable[[str], None] = lambda step: None,
) -> Path:
    """Writes the folder ``path`` with a compiled model as plain C, and returns it.

    ``name`` begins every symbol and names the files: ``name.h``, ``libname.a``, ``name.py``. ``recipe`` is what made
    the program, for the records. ``compiler``: a command that compiles C for the target; `toolchain` tells which one
    it is by default. Where there is none for Android or iOS, the folder has sources and kernels only, for Gradle or
    Xcode to build; for these it holds what they need, in ``android`` and ``swift``. A folder of an earlier export is
    replaced; on any failure it stays.

    Raises:
        InputError: the name is no C identifier.
        CompileError: there is no C compiler, or it fails.
        ArtifactError: the folder cannot be written.
    """
    target = compilation.target
    path, tools = check_export(target, path, name, compiler)
    progress("planning memory")
    plans, kernels = plan(compilation.lowered.module, compilation.signatures, f"{name}_k_")
    functions = source.interfaces(plans)
    progress("generating code")
    code = object_code(kernels, target)
    progress("packing weights")
    arrays = compilation.weights()
    states = compilation.states
    try:
        with new_folder(path) as folder:
            progress("writing C")
            numbers, offsets = _write_weights(folder / WEIGHTS, arrays)
            state_offsets, state_bytes = _place_states(states)
            numbers |= {
                "STATE_BYTES": state_bytes,
                "WORKSPACE_BYTES": max(p.workspace for p in plans),
                "SCRATCH_BYTES": rounded(max(p.scratch for p in plans)),
            }
            _write_sources(folder, name, target, functions, kernels, numbers, offsets, state_offsets)
            (folder / "src" / KERNELS).write_bytes(code)
            if tools is not None:
                progress("compiling C")
                _build(folder, name, tools)
            _write_readme(folder, name, target, functions, numbers)
            signature = {
                "name": name,
                "target": {key: value for key, value in target.to_dict().items() if key in MANIFEST_TARGET},
                "recipe": recipe,
                "versions": versions() | {"llvm": str(llvm_version_major())},
                **_signature(functions, states, compilation.program),
            }
            (folder / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n", encoding="utf-8")
            app = App(signature, target.arch, numbers["WEIGHTS_BYTES"], numbers["HEADER_CRC"])
            for file, text in app_files(app, target.os or "linux").items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"cannot write {str(path)!r}; nothing was left there",
            why=error.strerror or str(error),
            fix="choose a folder on a disk that has room and that you may write to",
        ) from error
    return path


def check_export(
    target: Target, path: str | os.PathLike[str], name: str, compiler: str | None
) -> tuple[Path, Toolchain | None]:
    """What can be wrong with the arguments of `export_c`, whatever the model: the folder to write, and the compiler.

    Raises as `export_c` does.
    """
    if not re.fullmatch(r"[A-Za-z]\w{0,63}", name, re.ASCII):
        raise InputError(
            f"{name!r} cannot be the name of a C export",
            fix="begin with a letter, and use letters, digits and _, 64 at most",
        )
    path = check_place(path, marker=SIGNATURE, kind="an exported model")
    try:
        return path, toolchain(target, compiler)
    except CompileError:
        if compiler is not None or target.os not in ("android", "ios"):
            raise
        return path, None


def _write_weights(path: Path, arrays: dict[str, np.ndarray]) -> tuple[dict[str, int], dict[str, int]]:
    """The file of weights (safetensors); its numbers for layout.h, and where each weight begins."""
    crc = 0
    for block in weight_blocks(arrays):
        crc = zlib.crc32(block, crc)
    head = header(arrays, {"crc32": f"{crc:08x}"})
    with open(path, "wb") as file:
        file.write(head)
        file.writelines(weight_blocks(arrays))
    offsets, at = {}, len(head)
    for name, array in arrays.items():
        offsets[name] = at
        at += array.nbytes + padding(array.nbytes)
    numbers = {
        "WEIGHTS_BYTES": at,
        "WEIGHTS_CRC": crc,
        "HEADER_BYTES": len(head),
        "HEADER_CRC": zlib.crc32(head),
    }
    return numbers, offsets


def _place_states(states: dict[str, TensorType]) -> tuple[dict[str, int], int]:
    offsets, at = {}, 0
    for name, state in states.items():
        offsets[name] = at
        at += rounded(int(np.prod(state.shape, dtype=np.int64)) * _bytes(state.dtype))
    return offsets, at


def _bytes(dtype: str) -> int:
    return 1 if dtype == "bool" else int(re.search(r"\d+$", dtype)[0]) // 8


def _write_sources(
    folder: Path,
    name: str,
    target: Target,
    functions: list[Interface],
    kernels: list[PlainKernel],
    numbers: dict[str, int],
    offsets: dict[str, int],
    state_offsets: dict[str, int],
) -> None:
    sources = folder / "src"
    sources.mkdir()

    def write(file: Path, text: str) -> None:
        text = text.replace("tersor_", f"{name}_").replace("TERSOR_", f"{name.upper()}_")
        file.write_text(text.replace('"tersor.h"', f'"{name}.h"'), encoding="utf-8")

    for file in _STATIC:
        write(sources / file, (SOURCES / file).read_text(encoding="utf-8"))
    write(sources / "layout.h", source.layout(numbers))
    write(sources / "functions.c", source.functions_source(functions, kernels, offsets, state_offsets))
    write(folder / f"{name}.h", source.header(functions))
    write(folder / "main.c", example.main_source(functions))
    (folder / "CMakeLists.txt").write_text(example.cmake(name), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("loader.py"), folder / f"{name}.py")


def _write_readme(
    folder: Path, name: str, target: Target, functions: list[Interface], numbers: dict[str, int]
) -> None:
    session = sum(numbers[key] for key in ("STATE_BYTES", "WORKSPACE_BYTES", "SCRATCH_BYTES"))
    sizes = {
        "weights": numbers["WEIGHTS_BYTES"],
        "session": session,
        "thread": numbers["SCRATCH_BYTES"],
    }
    linked = (folder / f"lib{name}.a").exists()
    text = example.readme(name, target, functions, sizes, linked=linked)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _build(folder: Path, name: str, tools: Toolchain) -> None:
    """The static library and the shared one."""
    sources = folder / "src"
    with tempfile.TemporaryDirectory(prefix="tersor-") as scratch:

        def objects(*options: str) -> list[Path]:
            compiled = [Path(scratch, file).with_suffix(".o") for file in COMPILED]
            for file, made in zip(COMPILED, compiled, strict=True):
                tools.compile(sources / file, made, [f"-I{folder}", *options])
            return [sources / KERNELS, *compiled]

        own = objects()
        tools.archive(own, folder / f"lib{name}.a")
        library = _LIBRARIES.get(tools.system, "lib{}.so").format(name)
        if tools.system == "windows":  # only what is linked to a DLL may say that it is exported
            own = objects(f"-D{name.upper()}_DLL")
        tools.link(own, folder / library, shared=True)


def _signature(functions: list[Interface], states: dict[str, TensorType], program: Program) -> dict[str, Any]:
    def tensor(field: Field) -> dict[str, Any]:
        return {
            "name": field.tensor.name,
            "field": field.name,
            "dtype": field.tensor.dtype,
            "shape": list(field.tensor.shape),
        }

    def dim(function: Interface, name: str) -> dict[str, Any]:
        low, high = function.plan.signature.dims[name]
        usual = example.usual_size(function.plan.signature, name)
        return {"field": function.dims[name], "min": low, "max": high, "usual": usual}

    return {
        "functions": [
            {
                "name": f.plan.name,
                "symbol": f.symbol,
                "dims": {name: dim(f, name) for name in f.plan.signature.dims},
                "inputs": [tensor(field) for field in f.inputs],
                "outputs": [tensor(field) for field in f.outputs],
                "states": list(f.plan.signature.states),
                "work": work.described(program.functions[f.plan.name]),
            }
            for f in functions
        ],
        "states": {n: {"dtype": s.dtype, "shape": list(s.shape)} for n, s in states.items()},
    }
