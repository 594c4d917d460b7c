"""Folders and files that appear complete or not at all: written beside their final place and renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor.errors import InputError


def may_replace(path: Path, marker: str) -> bool:
    """Whether nothing of the user's is at ``path``: nothing at all, an empty folder, or one of ours.

    Args:
        marker: the file that tells a folder of ours.
    """
    return not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file()))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        OSError: what the file system refuses; whatever was at ``path`` is there still.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        _sync(temporary)
        _replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary files of one folder that take the places of ``paths``, in order, when the block ends well.

    Raises:
        OSError: what the file system refuses; what was at the paths is there still, unless only renaming failed.
    """
    folder = paths[0].parent
    scratch = Path(tempfile.mkdtemp(prefix=f".{paths[0].name}.", dir=folder))
    try:
        temporary = tuple(scratch / path.name for path in paths)
        yield temporary
        for file in temporary:
            _sync(file)
        for file, path in zip(temporary, paths, strict=True):
            os.replace(file, path)
        _sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes plain data as a file of JSON, which appears complete or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with new_files(Path(path)) as (file,):
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}", why=str(error), fix="check the place and the free space"
        ) from error


def _replace(temporary: Path, path: Path) -> None:
    """Puts ``temporary`` at ``path``; what was there comes back if that fails."""
    if not path.exists():
        os.rename(temporary, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
