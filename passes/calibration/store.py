"""Statistics on disk, so that a run that was killed does not gather them again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from tersor.passes.base import Pass
from tersor.passes.cache import cache_folder, source_digest
from tersor.passes.calibration.statistics import Statistic


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
        self._folder, self._data, self._seed = cache_folder(folder, "statistics"), data, seed

    def load(self, value: str, wanted: Statistic, split: str) -> Statistic | None:
        """The statistic of the value with this digest; None when there is none, or a damaged one."""
        try:
            return wanted.restored(load_file(self._path(value, wanted, split)))
        except Exception:  # whatever a damaged file leads to
            return None

    def store(self, value: str, statistic: Statistic, split: str) -> None:
        """Keeps a statistic; the file appears complete or not at all. A full disk costs the entry, not the run."""
        path = self._path(value, statistic, split)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".new.")
        os.close(handle)
        try:
            save_file({name: t.contiguous() for name, t in statistic.state().items()}, temporary)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _path(self, value: str, statistic: Statistic, split: str) -> Path:
        parts = f"{value} {statistic.key} {split} {self._data} {self._seed} {source_digest(Pass)}"
        return self._folder / f"{hashlib.sha256(parts.encode()).hexdigest()}.safetensors"
