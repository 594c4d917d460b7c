"""Measured tiles: candidates round the analytic choice, timed on this machine, in a file that outlives the process.

Nothing here runs, and nothing is read, unless tuning is asked for: within ``using(database)`` a kernel takes the tile
recorded for it, everywhere else the analytic one, so that an untuned compilation is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.codegen import timing
from tersor.codegen.kernels.inner_product import inner_product
from tersor.codegen.tiles import GemmTile, choose, neighbours
from tersor.errors import CompileError, TargetError
from tersor.ir.dims import evaluate_shape, shape_symbols
from tersor.targets import Target, missing_on_host

if TYPE_CHECKING:
    from tersor.codegen.kernels.gemm import Gemm

ROWS = (1, 16, 128)
"""Row counts at which a kernel with a symbolic number of rows is timed; the geometric mean decides."""

COLD_BYTES = 64e6
"""Copies of the weights that a timing walks over, so that they come from memory as in a whole model."""

SECONDS = 0.15
"""Time spent on one candidate at one row count."""

WORTHWHILE = 0.98
"""A candidate replaces the analytic tile when it takes less than this fraction of its time; less is noise."""


@dataclass(frozen=True)
class Record:
    """The tile found for one kernel: seconds per call with it, and with the analytic tile."""

    key: str
    kernel: str
    tile: GemmTile
    seconds: float
    analytic_seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(line: str) -> Record | None:
        """The record on a line, or None where it is not one: a process may be killed while it writes."""
        try:
            values = json.loads(line)
            tile = values.pop("tile")
            return Record(tile=GemmTile(**{**tile, "streams": tuple(tile["streams"])}), **values)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Database:
    """Records in a file of JSON lines, found by content: kernel, target, and versions of the code generators.

    Records are appended one by one, so an interrupted search loses at most the kernel it was timing.

    Raises:
        CompileError: the file cannot be read, or its folder not made.
    """

    def __init__(self, path: Path):
        self.path = path
        self.used: dict[str, Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(path, error) from error
        self._records = {record.key: record for record in map(Record.from_json, lines) if record}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, kernel: Gemm, target: Target) -> Record | None:
        """The kernel's record; what was found is also kept in ``used``, for the manifest."""
        record = self._records.get(key(kernel, target))
        if record:
            self.used[record.key] = record
        return record

    def add(self, record: Record) -> None:
        """Keep a record, on disk when this returns. CompileError when the file cannot be written."""
        try:
            with self.path.open("a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                torn = file.read(1) not in (b"", b"\n")
                file.write((("\n" if torn else "") + record.to_json() + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._records[record.key] = record


def _unusable(path: Path, error: Exception) -> CompileError:
    return CompileError(
        "the database of measured tiles cannot be used",
        where=str(path),
        why=str(error),
        fix="free space or permissions there, let XDG_CACHE_HOME name another folder, or compile without tuning",
    )


def default_path() -> Path:
    """Where records are kept unless the caller says otherwise: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor" / "tuning.jsonl"


def key(kernel: Gemm, target: Target) -> str:
    """Hash of everything that the best tile depends on."""
    machine = {k: v for k, v in target.to_dict().items() if k not in ("name", "sources", "memory")}
    versions = [metadata.version(package) for package in ("tersor", "apache-tvm")]
    text = json.dumps([repr(kernel), machine, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


_active: ContextVar[Database | None] = ContextVar("tuning database", default=None)


@contextmanager
def using(database: Database) -> Iterator[Database]:
    """Kernels built inside take the database's tiles."""
    token = _active.set(database)
    try:
        yield database
    finally:
        _active.reset(token)


def recorded_tile(kernel: Gemm, target: Target) -> GemmTile | None:
    """The tile that the database in use has for a kernel, if any."""
    database = _active.get()
    record = database.find(kernel, target) if database else None
    return record.tile if record else None


def tune(
    kernels: Iterable[Gemm],
    target: Target,
    database: Database,
    minutes: float,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Time candidates for the kernels that have no record yet, until the time is used up; the new records.

    Raises TargetError when this machine cannot run the target's code.
    """
    if missing := missing_on_host(target):
        raise TargetError(
            f"tiles for {target.name!r} cannot be timed on this machine",
            why=f"its CPU lacks {', '.join(sorted(missing))}",
            fix="compile without tuning, or tune on the target itself",
        )
    deadline = time.monotonic() + 60 * minutes
    pending = [kernel for kernel in dict.fromkeys(kernels) if database.find(kernel, target) is None]
    found: list[Record] = []
    for number, kernel in enumerate(pending):
        record = _search(kernel, target, deadline)
        if record is None:
            progress(f"out of time, {len(pending) - number} kernels keep the analytic tile")
            break
        database.add(record)
        found.append(record)
        progress(f"{kernel.name()}: {record.analytic_seconds / record.seconds:.3f}x, {record.tile}")
    return found


def _search(kernel: Gemm, target: Target, deadline: float) -> Record | None:
    """The best of the analytic tile and its neighbours; None when there was no time to see them all."""
    product = inner_product(kernel.dtype, target, kernel.stored)
    analytic = choose(target, kernel.panels, product)
    tiles = _distinct(kernel, target, (analytic, *neighbours(analytic, target, product)))
    times: list[float] = []
    for tile in tiles:
        if time.monotonic() > deadline:
            return None
        times.append(_seconds(kernel, target, tile))
    best = min(range(len(tiles)), key=times.__getitem__)
    if times[best] > WORTHWHILE * times[0]:
        best = 0
    return Record(key(kernel, target), kernel.name(), tiles[best], times[best], times[0])


def _distinct(kernel: Gemm, target: Target, tiles: Iterable[GemmTile]) -> list[GemmTile]:
    """Tiles that lead to different code: what is not used by a kernel, blocks of a few rows say, needs no timing."""
    by_code: dict[str, GemmTile] = {}
    for tile in tiles:
        by_code.setdefault(kernel.build(target, tile).script(), tile)
    return list(by_code.values())


def _seconds(kernel: Gemm, target: Target, tile: GemmTile) -> float:
    """Seconds per call, the geometric mean over row counts."""
    from tersor.codegen.llvm import compile_function

    call = compile_function(kernel.build(target, tile), target)["main"]
    symbols = shape_symbols(kernel.lead)
    sizes = [round(rows ** (1 / len(symbols))) for rows in ROWS] if symbols else [1]
    times = [
        seconds_per_call(call, kernel, dict.fromkeys(symbols, size), SECONDS, COLD_BYTES) for size in sizes
    ]
    return math.exp(sum(map(math.log, times)) / len(times))


def seconds_per_call(
    call: Callable[..., Any], kernel: Gemm, symbols: dict[str, int], seconds: float, cold_bytes: float
) -> float:
    """Time of a compiled kernel with weights that are not in cache, for given sizes of symbolic dimensions.

    Calls walk over copies of the weights, ``cold_bytes`` in all, for about ``seconds``. A copy counts with its best
    time, so that other work on the machine is not measured; the result is the mean over the copies.
    """
    import tvm

    generator = np.random.default_rng(0)
    a, weights, *others = (
        tvm.runtime.tensor(_data(generator, evaluate_shape(spec.shape, symbols), spec.dtype))
        for spec in kernel.inputs()
    )
    results = [
        tvm.runtime.empty(evaluate_shape(spec.shape, symbols), spec.dtype) for spec in kernel.outputs()
    ]
    data = weights.numpy()
    copies = [weights, *(tvm.runtime.tensor(data) for _ in range(int(cold_bytes // data.nbytes)))]
    arguments = [(a, copy, *others, *results) for copy in copies]
    return timing.seconds_per_call(call, arguments, seconds)


def _data(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Ordinary numbers, also where a word holds several: codes in every byte, bf16 below 2 in every half."""
    if dtype == "int32":
        return generator.integers(0, 0x3FFF, (*shape, 2), dtype=np.uint16).view(np.int32)[..., 0]
    if dtype.startswith("float"):
        return generator.standard_normal(shape, dtype="float32").astype(dtype)
    return generator.integers(0, 100, shape).astype(dtype)
