"""Artifact folders: written beside their final place and renamed, read with every byte checked."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tersor.codegen.runtime.manifest import FILES, MANIFEST, PIECE, FileRecord, Manifest
from tersor.errors import ArtifactError
from tersor.folders import may_replace, new_folder


@contextmanager
def new_artifact(path: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes the artifact at `path` when the block ends well, and vanishes otherwise.

    `size` is the number of bytes that will be written, checked against the free space first. Raises
    ArtifactError as `check_place`, and for whatever the file system refuses.
    """
    path = check_place(path, overwrite)
    try:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with new_folder(path) as temporary:
            yield temporary
    except OSError as error:
        raise _unwritable(path, error, size) from error


def check_place(
    path: str | os.PathLike[str],
    overwrite: bool = True,
    marker: str = MANIFEST,
    kind: str = "a Tersor artifact",
) -> Path:
    """`path` without links, where a folder of this kind, known by its file ``marker``, may be written: an existing one
    is replaced if `overwrite` says so.

    Raises ArtifactError when there is no folder to write it to, or something else lies there.
    """
    try:
        path = Path(os.path.realpath(path))
        if not path.parent.is_dir():
            raise ArtifactError(
                f"cannot write {str(path)!r}",
                why=f"the folder {str(path.parent)!r} does not exist",
                fix="create it, or choose another place",
            )
        if not may_replace(path, marker):
            raise ArtifactError(
                f"will not overwrite {str(path)!r}",
                why=f"it exists and is not {kind}",
                fix="choose another name, or remove it yourself",
            )
        if path.exists() and not overwrite:
            raise ArtifactError(
                f"{str(path)!r} exists already", fix="choose another name, or allow it to be overwritten"
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
    except (TypeError, ValueError) as error:  # a number for a path, a zero byte in it
        raise ArtifactError(
            f"cannot write to {path!r}", why=str(error), fix="give the path of a folder"
        ) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with the sizes and hashes of the files that lie in `folder`."""
    text = manifest.with_files({name: file_record(folder / name) for name in FILES}).to_json()
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`; ArtifactError when there is none."""
    try:
        if not (folder / MANIFEST).is_file():
            why = f"there is no {MANIFEST} in it" if folder.is_dir() else "there is no such folder"
            raise ArtifactError(
                f"{str(folder)!r} is not an artifact", why=why, fix="pass a folder written by compiled.save()"
            )
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            "this artifact's manifest cannot be read",
            where=str(folder / MANIFEST),
            why=str(error),
            fix="check its permissions, or copy the artifact again",
        ) from error
    return Manifest.from_json(text, str(folder / MANIFEST))


def map_files(folder: Path, manifest: Manifest) -> dict[str, memoryview]:
    """The files of an artifact mapped into memory; ArtifactError when a byte differs from the manifest.

    Weights stay in the page cache, shared by all processes that load them. Reading them into huge pages instead
    was measured: no gain on BERT-base with 16 tokens, 2 to 3 % where a call does nothing but stream weights, for
    a load that is several times slower.
    """
    maps: dict[str, memoryview] = {}
    pieces = []
    for name in FILES:
        record = manifest.files.get(name)
        if record is None:
            raise _damaged(folder / name, "the manifest does not list it")
        offsets = range(0, record.size, PIECE)
        if len(offsets) != len(record.sha256):
            raise _damaged(folder / name, "the manifest does not hold a hash for each piece of it")
        maps[name] = _map(folder / name, record.size)
        pieces += [(name, offset, digest) for offset, digest in zip(offsets, record.sha256, strict=True)]

    def check(name: str, offset: int, digest: str) -> None:
        if hashlib.sha256(maps[name][offset : offset + PIECE]).hexdigest() != digest:
            raise _damaged(folder / name, f"its contents changed after byte {offset}")

    # Hashing runs without the interpreter lock, at 0.5 to 2 GB/s a core.
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(lambda piece: check(*piece), pieces))
    return maps


def file_record(path: Path) -> FileRecord:
    """Size and hashes of a file."""
    hashes = []
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            hashes.append(hashlib.sha256(piece).hexdigest())
        return FileRecord(file.tell(), tuple(hashes))


def _map(path: Path, size: int) -> memoryview:
    """The file in memory, private and writable (copy on write): DLPack cannot express read-only memory."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise _damaged(path, f"it has {found} bytes, the manifest says {size}")
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return memoryview(mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=protection))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "this artifact is damaged", where=str(path), why=why, fix="copy it again, or compile the model again"
    )


def _unwritable(path: Path, error: OSError, size: int = 0) -> ArtifactError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = f"make {size / 1e6:,.0f} MB free there, or save to another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "choose a folder you may write to"
    else:
        fix = "check the disk, or save to another one"
    return ArtifactError(
        f"cannot write {str(path)!r}; nothing was left there",
        where=error.filename,
        why=error.strerror,
        fix=fix,
    )
