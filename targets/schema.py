"""What a target is: a description of a CPU and its memory, as plain data that can be kept in TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tersor.errors import TargetError
from tersor.targets.architectures import ARCHITECTURES, SYSTEMS, VectorUnit

NUMBERS = ("cores", "l1d", "l2", "l3", "memory", "bandwidth")
"""Fields that hold a measured or assumed quantity; each one present needs an entry in `sources`."""

REQUIRED = ("name", "arch")
LISTS = ("mattr", "features")
TEXTS = ("name", "arch", "mcpu", "os")


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind: ``core`` is LLVM's name of it, ``mhz`` the highest frequency, None where unknown.

    Raises TargetError for a field of the wrong kind or a number not above 0.
    """

    core: str
    count: int
    mhz: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.core, str) and self.core):
            raise TargetError(f"core of a cluster must be a non-empty text, got {self.core!r}")
        for key, value in (("count", self.count), ("mhz", self.mhz)):
            if not _is_quantity(value) and (key, value) != ("mhz", None):
                raise TargetError(
                    f"{key} of cluster {self.core!r} must be a whole number above 0, got {value!r}"
                )

    def __str__(self) -> str:
        return f"{self.count} {self.core}" + (f" up to {self.mhz} MHz" if self.mhz else "")


@dataclass(frozen=True)
class Target:
    """A machine to compile for. Unknown quantities are None, never guessed.

    `features` are Tersor's names for what kernels ask about (`avx2`, `avx512`, `vnni`, `neon`, `dotprod`, ...); `mcpu`
    and `mattr` are LLVM's names for the same machine, complete enough to generate code from. `os` is one of `SYSTEMS`.
    Sizes are in bytes: `l1d` and `l2` per core, `l3` shared by all cores, `memory` what a process may use; `bandwidth`
    is the most that can be read of it in a second.
    `clusters` are the kinds of cores, the fastest first, whose caches `l1d` and `l2` are; none where it is not known.
    Features are those that all cores have, as a thread may run on any of them.
    `sources` says for every number where it comes from; a guess starts with "assumed".
    Two targets are equal when they describe the same machine, whatever their sources say.

    Raises TargetError for a field of the wrong kind, a quantity not above 0, a number without a source, an unknown
    system, or clusters that do not add up to `cores`.
    """

    name: str
    arch: str
    mcpu: str | None = None
    mattr: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    cores: int | None = None
    l1d: int | None = None
    l2: int | None = None
    l3: int | None = None
    memory: int | None = None
    bandwidth: int | None = None
    os: str | None = None
    clusters: tuple[Cluster, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        problems = []
        for key in TEXTS:
            value = getattr(self, key)
            if not (isinstance(value, str) and value or value is None and key not in REQUIRED):
                problems.append(f"{key} must be a non-empty text, got {value!r}")
        for key in NUMBERS:
            value = getattr(self, key)
            if value is None:
                continue
            if not _is_quantity(value):
                problems.append(f"{key} must be a whole number above 0, got {value!r}")
            if not self.sources.get(key):
                problems.append(
                    f"{key} has no entry in sources; name where it comes from, or say 'assumed: ...'"
                )
        if isinstance(self.os, str) and self.os not in SYSTEMS:
            problems.append(f"os {self.os!r} is none of {', '.join(SYSTEMS)}")
        if self.clusters and sum(cluster.count for cluster in self.clusters) != self.cores:
            problems.append(f"its clusters have other than {self.cores} cores in all")
        if self.clusters and not self.sources.get("clusters"):
            problems.append("clusters has no entry in sources")
        for attribute in self.mattr:
            if not re.fullmatch(r"[+-][a-z0-9._-]+", attribute):
                problems.append(
                    f"mattr entry {attribute!r} is not an LLVM feature such as '+avx2' or '-avx512fp16'"
                )
        if problems:
            raise TargetError(f"target {self.name!r} is not described correctly", why="; ".join(problems))

    @property
    def llvm_triple(self) -> str:
        """LLVM's name of architecture and system, e.g. `x86_64-linux-gnu`. TargetError for a pair without code."""
        known = ARCHITECTURES[self.arch].triples if self.arch in ARCHITECTURES else {}
        if (self.os or "linux") not in known:
            raise TargetError(
                f"no code is generated for {self.os or 'linux'} on {self.arch}",
                where=f"target {self.name!r}",
                fix="; ".join(f"{name} runs {', '.join(a.triples)}" for name, a in ARCHITECTURES.items()),
            )
        return known[self.os or "linux"]

    @property
    def vector_bits(self) -> int:
        """Width of a vector register in bits, e.g. 512 with AVX-512. TargetError without a vector unit."""
        return self._vector_unit.bits

    @property
    def vector_registers(self) -> int:
        """How many vector registers there are, e.g. 32 with AVX-512. TargetError without a vector unit."""
        return self._vector_unit.registers

    @property
    def _vector_unit(self) -> VectorUnit:
        units = ARCHITECTURES[self.arch].vectors if self.arch in ARCHITECTURES else ()
        found = next((unit for unit in units if unit.feature in self.features), None)
        if found is None:
            raise TargetError(
                f"target {self.name!r} has no vector unit that Tersor generates code for",
                why=f"its architecture is {self.arch}, its features are {', '.join(sorted(self.features)) or 'none'}",
                fix="choose a target with avx2, avx512 or neon; `tersor targets` lists them",
            )
        return found

    def check(self) -> None:
        """TargetError where no code is generated for this machine: its system, or its lack of a vector unit."""
        _ = self.llvm_triple, self._vector_unit

    def lanes(self, dtype: str) -> int:
        """How many values of `dtype` ("float32", "int8", "bool", ...) fill one vector register."""
        if dtype == "bool":
            return self.vector_bits // 8
        bits = re.search(r"\d+$", dtype)
        if bits is None:
            raise TargetError(
                f"{dtype!r} is not a dtype with a width in bits", fix="use names like 'float32' or 'int8'"
            )
        return self.vector_bits // int(bits.group())

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON, TOML); absent values are left out. `Target.from_dict` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["mattr"], values["features"] = list(self.mattr), sorted(self.features)
        values["clusters"] = [
            {key: value for key, value in asdict(cluster).items() if value is not None}
            for cluster in self.clusters
        ]
        values["sources"] = dict(self.sources)
        return {
            key: value for key, value in values.items() if value is not None and (key != "clusters" or value)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str | None = None) -> Target:
        """Build a target from plain data; errors name `where`. TargetError for unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        unknown, missing = sorted(set(values) - known), [key for key in REQUIRED if key not in values]
        wrong = [key for key in LISTS if not _is_text_list(values.get(key, []))]
        if not isinstance(values.get("sources", {}), Mapping):
            wrong.append("sources")
        clusters = values.get("clusters", [])
        if not _are_clusters(clusters):
            wrong.append("clusters")
        problems = [
            f"{label}: {', '.join(keys)}"
            for label, keys in (
                ("unknown keys", unknown),
                ("missing keys", missing),
                ("not the right kind", wrong),
            )
            if keys
        ]
        if problems:
            raise TargetError(
                "a target description cannot be read",
                where=where,
                why="; ".join(problems),
                fix=f"the keys are {', '.join(f.name for f in fields(cls))}",
            )
        data = dict(values)
        data["mattr"], data["features"] = tuple(data.get("mattr", ())), frozenset(data.get("features", ()))
        data["clusters"] = tuple(Cluster(**cluster) for cluster in clusters)
        return cls(**data)

    @classmethod
    def from_toml(cls, path: str | Path) -> Target:
        """Read a target from a TOML file. TargetError when the file is missing or malformed."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise TargetError(
                "a target file cannot be read",
                where=str(path),
                why=str(error),
                fix="give the path of a TOML file as docs/targets.md shows",
            ) from error
        return cls.from_dict(values, where=str(path))

    def to_toml(self) -> str:
        """The target as TOML text that `from_toml` reads back."""
        values = self.to_dict()
        sources, clusters = values.pop("sources"), values.pop("clusters", [])
        lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
        for cluster in clusters:
            lines += ["", "[[clusters]]"] + [f"{key} = {_toml(value)}" for key, value in cluster.items()]
        lines += ["", "[sources]"] + [f"{_toml(key)} = {_toml(value)}" for key, value in sources.items()]
        return "\n".join(lines) + "\n"


def _is_text_list(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, str) for item in value)


def _is_quantity(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_clusters(value: object) -> bool:
    """A list of tables with the keys of a `Cluster`, of which only ``mhz`` may be missing."""
    known = {f.name for f in fields(Cluster)}
    return isinstance(value, list | tuple) and all(
        isinstance(item, Mapping) and known - {"mhz"} <= set(item) <= known for item in value
    )


def _toml(value: str | int | list[str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
