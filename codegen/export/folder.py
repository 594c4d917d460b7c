"""An exported model on disk: what its folder says about it, and the example program that is built of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.codegen.export.toolchain import toolchain
from tersor.codegen.runtime.dimensions import parse
from tersor.codegen.runtime.manifest import FunctionSignature, TensorType
from tersor.errors import ArtifactError, TersorError
from tersor.targets import Target
from tersor.targets.estimate import Work

SIGNATURE, WEIGHTS, KERNELS = "signature.json", "weights.bin", "kernels.o"

COMPILED = ("model.c", "functions.c", "threads.c")
"""The C files that the library is made of, beside the kernels."""


@dataclass(frozen=True)
class Exported:
    """An exported model: ``read`` makes it of a folder.

    functions: how each is called, by name; symbols: what each is called in C. usual: a size for each dimension of each
    function, for where none is given.
    """

    path: Path
    name: str
    target: Target
    recipe: str
    versions: Mapping[str, str]
    functions: Mapping[str, FunctionSignature]
    symbols: Mapping[str, str]
    usual: Mapping[str, Mapping[str, int]]
    _work: Mapping[str, Sequence[Mapping[str, Any]]]

    @classmethod
    def read(cls, path: Path) -> Exported:
        """The model in a folder. ArtifactError when there is none, or its description cannot be used."""
        file = path / SIGNATURE
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            functions = {f["name"]: f for f in body["functions"]}
            return cls(
                path=path,
                name=body["name"],
                target=Target.from_dict(body["target"], where=str(file)),
                recipe=body["recipe"],
                versions=body["versions"],
                functions={name: _signature(f) for name, f in functions.items()},
                symbols={name: f["symbol"] for name, f in functions.items()},
                usual={
                    name: {dim: d["usual"] for dim, d in f["dims"].items()} for name, f in functions.items()
                },
                _work={name: f["work"] for name, f in functions.items()},
            )
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            TersorError,
        ) as error:
            raise ArtifactError(
                "this folder is no exported model that can be used",
                where=str(file),
                why=f"{type(error).__name__}: {error}",
                fix="export it again: compiled.export_c(folder), or tersor compile MODEL --export-c FOLDER",
            ) from error

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    def work(self, function: str, sizes: Mapping[str, int]) -> list[Work]:
        """What a call of a function multiplies at these sizes."""
        return [
            Work(row["count"], row["dtype"], parse(row["products"]).evaluate(sizes), row["weights"])
            for row in self._work[function]
        ]

    def build(self, program: Path, *, static: bool) -> None:
        """Compiles the folder's main.c and sources to a program for the target.

        static: with its C library, so that it needs nothing of the system there; for Android too, without an NDK.

        Raises:
            CompileError: there is no C compiler for the target, or it fails.
        """
        tools = toolchain(self.target, static=static)
        static &= self.target.os not in ("macos", "windows")
        with tempfile.TemporaryDirectory(prefix="tersor-") as scratch:
            objects = [self.path / "src" / KERNELS]
            for source in (self.path / "main.c", *(self.path / "src" / file for file in COMPILED)):
                objects.append(Path(scratch, source.name).with_suffix(".o"))
                tools.compile(source, objects[-1], [f"-I{self.path}"])
            tools.link(objects, program, static=static)


def is_exported(path: Path) -> bool:
    """Whether a folder is one that `export_c` wrote."""
    return (path / SIGNATURE).is_file()


def _signature(function: Mapping[str, Any]) -> FunctionSignature:
    def tensors(described: list[Mapping[str, Any]]) -> tuple[TensorType, ...]:
        return tuple(TensorType(t["name"], t["dtype"], tuple(t["shape"])) for t in described)

    dims = function["dims"]
    return FunctionSignature(
        inputs=tensors(function["inputs"]),
        outputs=tensors(function["outputs"]),
        dims={name: (dim["min"], dim["max"]) for name, dim in dims.items()},
        states=tuple(function["states"]),
    )
