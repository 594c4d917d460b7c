"""Writes an artifact: the folder that `codegen.runtime` loads and runs without the compiler."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tersor.codegen.runtime.folder import new_artifact, write_manifest
from tersor.codegen.runtime.manifest import MODULE, REPORT, WEIGHTS, Manifest
from tersor.codegen.runtime.weights import header, padding
from tersor.errors import ArtifactError

_BLOCK = 16 << 20


def write_artifact(
    path: str | os.PathLike[str],
    *,
    module: bytes | str | os.PathLike[str],
    weights: Mapping[str, np.ndarray],
    manifest: Manifest,
    report: Mapping[str, Any],
    overwrite: bool = True,
) -> Path:
    """Write `path` (by custom `name.tersor`) and return where it lies.

    module      the VM executable as a shared library: its bytes or the file it lies in
    weights     every tensor that some function of the manifest lists, packed as its kernel wants it
    manifest    without `files`, which are filled in here
    report      plain data for report.json

    The same arguments give the same bytes. An artifact that lies at `path` is replaced by renaming; on any
    failure it stays as it was and nothing else is left behind. Raises ArtifactError: full disk, no
    permission, `path` is no artifact, weights and manifest disagree, the report is not plain data.
    """
    _check_weights(weights, manifest)
    try:
        report_text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArtifactError("the report holds something that JSON cannot", why=str(error)) from error
    try:
        module_bytes = module if isinstance(module, bytes) else Path(module).read_bytes()
    except OSError as error:
        raise ArtifactError(
            "the compiled module cannot be read", where=str(module), why=str(error)
        ) from error
    head = header(weights)
    size = sum(tensor.nbytes + padding(tensor.nbytes) for tensor in weights.values())
    size += len(head) + len(module_bytes) + len(report_text) + (1 << 20)
    with new_artifact(Path(path), size, overwrite) as folder:
        _write(folder / MODULE, [module_bytes])
        _write(folder / WEIGHTS, chain([head], weight_blocks(weights)))
        _write(folder / REPORT, [report_text.encode()])
        write_manifest(folder, manifest)
    return Path(path)


def _check_weights(weights: Mapping[str, np.ndarray], manifest: Manifest) -> None:
    wanted = {name for signature in manifest.functions.values() for name in signature.weights}
    if not manifest.functions or wanted != set(weights):
        raise ArtifactError(
            "the weights of an artifact do not match its manifest",
            why=f"functions: {sorted(manifest.functions)}, not given: {sorted(wanted - set(weights))[:8]}, "
            f"given but not used: {sorted(set(weights) - wanted)[:8]}",
            fix="name every packed weight in the signature of its function; have a function",
        )


def weight_blocks(weights: Mapping[str, np.ndarray]) -> Iterable[bytes | memoryview]:
    """The bytes of a file of weights behind its header."""
    for tensor in weights.values():
        # A reshape of a contiguous array copies nothing; 0-d arrays become one element.
        flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _BLOCK):
            yield flat[start : start + _BLOCK].data
        yield bytes(padding(tensor.nbytes))


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
