"""Statistics, and what passes made of them piece by piece, on disk, so that a killed run does not do it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tersor.passes.base import Pass
from tersor.passes.cache import cache_folder, source_digest
from tersor.passes.calibration.statistics import Statistic
from tersor.passes.context import Context

Tensors = dict[str, torch.Tensor]

PAUSE = 20.0
"""Seconds after which what a sweep has gathered is kept; as many are lost by a kill."""

COST = 0.05
"""Up to this part of its time a sweep writes."""


class _Files:
    """Tensors, and a note of plain data, in one file per key.

    Args:
        folder: the cache of a run; made where it does not exist.
        kind: the folder inside it.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, kind: str):
        self._folder = cache_folder(folder, kind)

    def load(self, key: str) -> tuple[Tensors, Any] | None:
        """What was kept under the key; None when there is nothing, or it is damaged."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(  # noqa: SIM118
                    file.metadata()["note"]
                )
        except Exception:  # whatever a damaged file leads to
            return None

    def store(self, key: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        """The file appears complete or not at all. A full disk costs the entry, not the run."""
        path, temporary = self._path(key), None
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".new.")
            os.close(handle)
            save_file(
                {name: t.contiguous() for name, t in tensors.items()}, temporary, {"note": json.dumps(note)}
            )
            os.replace(temporary, path)
        except (OSError, SafetensorError):
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def drop(self, key: str) -> None:
        """Takes out what was kept under the key."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


class StatisticsStore:
    """One file per statistic of a value over data.

    Args:
        folder: the cache of a run; made where it does not exist.
        data: hash of the calibration data.
        seed: of the random choices.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, data: str, seed: int):
        self._files, self._unfinished = _Files(folder, "statistics"), _Files(folder, "unfinished")
        self._data, self._seed = data, seed

    def load(self, value: str, wanted: Statistic, split: str) -> Statistic | None:
        """The statistic of the value with this digest; None when there is none, or a damaged one."""
        if (found := self._files.load(self._key(value, wanted, split))) is None:
            return None
        return wanted.fresh().restore(found[0])

    def store(self, value: str, statistic: Statistic, split: str) -> None:
        """Keeps a statistic of the value with this digest."""
        self._files.store(self._key(value, statistic, split), statistic.state())

    def sweep(self, wanted: Iterable[tuple[str, Statistic]], split: str) -> Unfinished:
        """What a sweep that gathers these statistics, of values with these digests, has got so far."""
        keys = [self._key(value, statistic, split) for value, statistic in wanted]
        return Unfinished(self._unfinished, json.dumps(keys))

    def _key(self, value: str, statistic: Statistic, split: str) -> str:
        return f"{value} {statistic.key} {split} {self._data} {self._seed} {source_digest(Pass)}"


class Unfinished:
    """A sweep in the middle, on disk from time to time, so that a killed one does not begin anew."""

    def __init__(self, files: _Files, key: str):
        self._files, self._key = files, key
        self._kept, self._took = time.monotonic(), 0.0

    def load(self) -> tuple[Tensors, int] | None:
        """What was gathered, and from how many batches; None when there is nothing."""
        return self._files.load(self._key)

    def keep(self, state: Callable[[], Tensors], batches: int) -> None:
        """Keeps what was gathered from so many batches, where it is time to."""
        now = time.monotonic()
        if now - self._kept >= max(PAUSE, self._took / COST):
            self._files.store(self._key, state(), batches)
            self._kept = time.monotonic()
            self._took = self._kept - now

    def drop(self) -> None:
        """Forgets it, once its results are kept."""
        self._files.drop(self._key)


class Pieces:
    """What a pass that works through a program piece by piece has finished of it.

    A piece goes by the digests of the values that it follows from (`tersor.ir.Function.value_digests`), the pass's
    configuration and source code, the data and the seed. Without a cache folder nothing is kept.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, pass_: Pass, context: Context):
        source = source_digest(type(pass_))
        self._files = None if context.cache is None or source is None else _Files(context.cache, "pieces")
        data = context.calibration.digest if context.calibration is not None else None
        self._made_by = [pass_.name, pass_.config(), source, data, context.seed]

    def load(self, *values: str) -> tuple[Tensors, Any] | None:
        """Tensors and note of the piece that follows from these; None when it is not finished."""
        return None if self._files is None else self._files.load(self._key(values))

    def store(self, values: tuple[str, ...], tensors: Mapping[str, torch.Tensor], note: Any) -> None:
        """Keeps a finished piece."""
        if self._files is not None:
            self._files.store(self._key(values), tensors, note)

    def _key(self, values: tuple[str, ...]) -> str:
        return json.dumps([*self._made_by, *values], sort_keys=True)
