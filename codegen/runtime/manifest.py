"""The manifest of an artifact: what its module takes and returns, what it needs, where it comes from.

Stored as `manifest.json`. Reading checks everything that running depends on, so a damaged or foreign file is
one ArtifactError and never a crash later. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tersor.codegen.runtime.dimensions import Expression, parse
from tersor.errors import ArtifactError

SCHEMA = 2
"""Raised when a manifest of the new kind cannot be read by the old code."""

MANIFEST, MODULE, WEIGHTS, REPORT = "manifest.json", "module.so", "weights.safetensors", "report.json"
FILES = (MODULE, WEIGHTS, REPORT)
"""The files whose hashes the manifest records; the names are fixed, so a manifest cannot point elsewhere."""

DTYPES = (
    "float64", "float32", "float16", "bfloat16",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """An input, output or state: name, dtype, shape of ints and dimension expressions (`"batch"`, `"2*length"`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class FunctionSignature:
    """How one compiled function is called.

    inputs      in the order of the compiled function's parameters
    outputs     the tensors of the tuple it returns, in order; dots in the names nest them, see `Outputs`
    dims        name -> (smallest, largest) of every symbolic dimension; each occurs alone in some input shape
    states      names of the states it reads or updates, passed after the inputs in this order
    weights     names in weights.safetensors, passed after the states in this order
    example     dimension values of the example the model was captured with; a benchmark's default sizes
    """

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    example: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ArtifactError(
                "a function signature is not consistent",
                why="; ".join(problems),
                fix="compile the model again",
            )

    def _problems(self) -> Iterator[str]:
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            names = [tensor.name for tensor in tensors]
            yield from (
                f"{kind} {n!r} occurs twice" for n in sorted({n for n in names if names.count(n) > 1})
            )
            for tensor in tensors:
                if tensor.dtype not in DTYPES:
                    yield f"{kind} {tensor.name!r} has the unknown dtype {tensor.dtype!r}"
                yield from self._shape_problems(kind, tensor)
        alone = {dim for tensor in self.inputs for dim in tensor.shape if isinstance(dim, str)}
        for name, bounds in self.dims.items():
            if not name.isidentifier():
                yield f"dimension name {name!r} is not an identifier"
            if name not in alone:
                yield f"dimension {name!r} does not occur alone in any input shape"
            if not (len(bounds) == 2 and all(map(_is_size, bounds)) and bounds[0] <= bounds[1]):
                yield f"dimension {name!r} has the range {bounds!r}"
            elif not bounds[0] <= self.example.get(name, bounds[0]) <= bounds[1]:
                yield f"dimension {name!r} has an example outside its range"

    def _shape_problems(self, kind: str, tensor: TensorType) -> Iterator[str]:
        for dim in tensor.shape:
            if isinstance(dim, str):
                try:
                    free = parse(dim).symbols - set(self.dims)
                except ValueError as error:
                    yield f"{kind} {tensor.name!r}: {error}"
                    continue
                if free:
                    yield f"{kind} {tensor.name!r} uses dimensions {sorted(free)}, which have no range"
            elif not _is_size(dim):
                yield f"{kind} {tensor.name!r} has the dimension {dim!r}"


PIECE = 8 << 20
"""Bytes of a file that are hashed together; pieces are hashed in parallel."""


@dataclass(frozen=True)
class FileRecord:
    """Size of a file in bytes, and the sha256 of each `PIECE` bytes of it: pieces are checked in parallel."""

    size: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact but its code and weights.

    functions   name -> signature; `main`, or the only one, is what calling the model runs
    states      name -> what sessions keep from call to call; sizes are fixed
    target      compiled for: keys name, arch, mcpu, mattr, features, os of `tersor.targets.Target`
    versions    `tersor`, `tvm`, `tvm_ffi`: what made it; an artifact loads with the same TVM minor version
    recipe, gates, tuning    the choices that went into it (plain data, kept for reproduction)
    verified    whether the lowered code was compared with the program; `errors` holds what was measured
    threads     default number of threads; None means one per physical core that the process may use
    files       filled in when the artifact is written
    """

    functions: Mapping[str, FunctionSignature]
    target: Mapping[str, Any]
    versions: Mapping[str, str]
    states: Mapping[str, TensorType] = field(default_factory=dict)
    recipe: str = "fp32"
    gates: tuple[Mapping[str, Any], ...] = ()
    tuning: tuple[Mapping[str, Any], ...] = ()
    verified: bool = False
    errors: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            f"state {name!r} is {state}, which no memory can hold"
            for name, state in self.states.items()
            if state.dtype not in DTYPES or not all(map(_is_size, state.shape))
        ]
        problems += [
            f"function {name!r} uses the states {sorted(unknown)}, which are not listed"
            for name, signature in self.functions.items()
            if (unknown := set(signature.states) - set(self.states))
        ]
        if problems:
            raise ArtifactError(
                "the states of an artifact are not consistent",
                why="; ".join(problems),
                fix="compile the model again",
            )

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same manifest with the sizes and hashes of its files."""
        return replace(self, files=dict(files))

    def to_json(self) -> str:
        """The text of manifest.json, the same for equal manifests; ArtifactError for data that is not plain."""
        body = {
            "schema": SCHEMA,
            "versions": dict(self.versions),
            "target": dict(self.target),
            "recipe": self.recipe,
            "threads": self.threads,
            "functions": {name: _signature_to_data(s) for name, s in self.functions.items()},
            "states": {n: {"dtype": s.dtype, "shape": list(s.shape)} for n, s in self.states.items()},
            "gates": list(self.gates),
            "tuning": list(self.tuning),
            "verified": self.verified,
            "errors": dict(self.errors),
            "files": {n: {"size": f.size, "sha256": list(f.sha256)} for n, f in sorted(self.files.items())},
        }
        try:
            return json.dumps({"digest": _digest(body), **body}, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                "the manifest holds something that JSON cannot",
                why=str(error),
                fix="gates, tuning and errors must be plain data: finite numbers, text, lists and mappings",
            ) from error

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Read and check manifest.json, called `where` in errors. ArtifactError for anything unusable."""

        def refuse(why: str, fix: str = "write or copy the artifact again") -> ArtifactError:
            return ArtifactError("this artifact's manifest cannot be used", where=where, why=why, fix=fix)

        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise refuse(f"it is not valid JSON ({error})") from error
        if not isinstance(body, dict) or "schema" not in body:
            raise refuse(
                "it is not the manifest of a Tersor artifact", "pass a folder written by compiled.save()"
            )
        if body["schema"] != SCHEMA:
            raise refuse(
                f"it has schema {body['schema']!r}, this version of Tersor reads schema {SCHEMA}",
                "compile the model again with this version, or install the version of Tersor that wrote it",
            )
        digest = body.pop("digest", None)
        if digest != _digest(body):
            raise refuse("its checksum does not match its contents: it was damaged or edited")
        for key, kind in _KINDS.items():
            if not isinstance(body.get(key), kind):
                raise refuse(f"its entry {key!r} is missing or not of the right kind")
        try:
            return Manifest(
                functions={str(n): _signature_from_data(s) for n, s in body["functions"].items()},
                target=body["target"],
                versions=body["versions"],
                states={
                    str(n): TensorType(str(n), s["dtype"], tuple(s["shape"]))
                    for n, s in body["states"].items()
                },
                recipe=body["recipe"],
                gates=tuple(body["gates"]),
                tuning=tuple(body["tuning"]),
                verified=body["verified"],
                errors=body["errors"],
                threads=body.get("threads"),
                files={n: FileRecord(int(f["size"]), tuple(f["sha256"])) for n, f in body["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise refuse(f"it is incomplete ({type(error).__name__}: {error})") from error


def expressions(tensor: TensorType) -> tuple[int | Expression, ...]:
    """The shape of a tensor with its expressions parsed."""
    return tuple(parse(dim) if isinstance(dim, str) else dim for dim in tensor.shape)


_KINDS = {
    "functions": dict, "states": dict, "target": dict, "versions": dict, "recipe": str, "gates": list, "tuning": list,
    "verified": bool, "errors": dict, "files": dict,
}  # fmt: skip


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _signature_to_data(signature: FunctionSignature) -> dict[str, Any]:
    def tensors(items: tuple[TensorType, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in items]

    return {
        "inputs": tensors(signature.inputs),
        "outputs": tensors(signature.outputs),
        "dims": {name: list(bounds) for name, bounds in signature.dims.items()},
        "example": dict(signature.example),
        "weights": list(signature.weights),
        "states": list(signature.states),
    }


def _signature_from_data(data: Mapping[str, Any]) -> FunctionSignature:
    def tensors(items: list[dict[str, Any]]) -> tuple[TensorType, ...]:
        return tuple(TensorType(t["name"], t["dtype"], tuple(t["shape"])) for t in items)

    return FunctionSignature(
        inputs=tensors(data["inputs"]),
        outputs=tensors(data["outputs"]),
        dims={name: (low, high) for name, (low, high) in data["dims"].items()},
        example=dict(data["example"]),
        weights=tuple(data["weights"]),
        states=tuple(data["states"]),
    )


def read_version(text: str) -> tuple[str, ...]:
    """Major and minor of a version text, the part that must agree between writer and reader."""
    return tuple(re.findall(r"\d+", text)[:2])
