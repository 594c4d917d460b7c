"""Results of passes on disk, so that a run that was killed, or is repeated with another ending, resumes.

The key of a result says everything that it follows from: the program (structure, names, contents), the pass's
configuration, the source code of the pass and of what it stands on, seed, target and, for calibrated passes, the data.
An entry holds the new program and those of its parameters that the program before did not have.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tersor.errors import InputError
from tersor.ir import Program, verify
from tersor.ir.program import PROVENANCE
from tersor.ir.serialize import program_from_json, program_to_json
from tersor.passes import facts
from tersor.passes.base import Finding, Pass
from tersor.passes.context import Context
from tersor.passes.report import StepReport

_ENTRY, _TENSORS = "entry.json", "parameters.safetensors"
_KEPT = ("status", "seconds", "changes", "skips", "error", "total_error", "summary", "notes")


def cache_folder(folder: str | Path, *inner: str) -> Path:
    """A folder for results (or one inside it), made where it does not exist.

    Raises:
        InputError: it cannot be made.
    """
    path = Path(folder, *inner)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot use the cache folder {str(folder)!r}",
            why=str(error),
            fix="give a folder that you may write to",
        ) from None
    return path


class StepCache:
    """A folder of results, one folder each.

    Args:
        folder: made where it does not exist.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, folder: str | Path):
        self.folder = cache_folder(folder)

    def key(self, pass_: Pass, context: Context, program: Program) -> str | None:
        """The name of the result of a pass on a program; None when it follows from more than can be named."""
        recorded = {f.name for f in facts.known() if f.site is None and f.program is None}
        source = source_digest(type(pass_))
        if source is None or recorded & (pass_.requires | pass_.provides):
            return None
        parts = [
            program.digest(), _names(program),
            pass_.name, pass_.config(), source, context.seed,
            context.calibration.digest if pass_.calibrated and context.calibration is not None else None,
            [context.reference.digest(), _names(context.reference)] if context.reference is not None else None,
            asdict(context.target) if context.target is not None else None,
            context.profile is not None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_sorted_text).encode()).hexdigest()

    def load(self, key: str, before: Program, step: StepReport) -> Program | None:
        """The program under this key, ``step`` filled as when it was made; None when there is none.

        A damaged entry is as good as none.
        """
        folder = self.folder / key
        try:
            entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
            found = {field: entry["step"][field] for field in _KEPT}
            program = before if entry["program"] is None else self._restore(folder, entry, before)
        except Exception:  # whatever a damaged file leads to
            return None
        for field, value in found.items():
            setattr(step, field, value)
        step.changes = [Finding(**finding) for finding in step.changes]
        step.skips = [Finding(**finding) for finding in step.skips]
        step.cached = True
        return program

    def store(self, key: str, before: Program, after: Program, step: StepReport) -> None:
        """Keeps a result; it appears complete or not at all. A full disk costs the entry, not the run."""
        if (self.folder / key).exists():
            return
        known = {p.digest for p in before.parameters.values()}
        new = {name: p.tensor for name, p in after.parameters.items() if p.digest not in known}
        entry: dict[str, Any] = {
            "step": {k: v for k, v in asdict(step).items() if k in _KEPT},
            "program": None,
        }
        if after is not before:
            digests = {name: p.digest for name, p in after.parameters.items()}
            entry |= {"program": program_to_json(after), "parameters": digests, "digest": after.digest()}
        temporary = None
        try:
            temporary = Path(tempfile.mkdtemp(prefix=".new.", dir=self.folder))
            (temporary / _ENTRY).write_text(json.dumps(entry), encoding="utf-8")
            save_file({name: tensor.clone() for name, tensor in new.items()}, temporary / _TENSORS)
            temporary.rename(self.folder / key)
        except (OSError, SafetensorError) as error:
            step.notes.append(f"its result was not cached: {error}")
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    @staticmethod
    def _restore(folder: Path, entry: dict[str, Any], before: Program) -> Program:
        known = {p.digest: p for p in before.parameters.values()}
        new = load_file(folder / _TENSORS)
        tensors = {n: known[d].tensor if d in known else new[n] for n, d in entry["parameters"].items()}
        program = program_from_json(entry["program"], tensors)
        for name, digest in entry["parameters"].items():
            if digest in known:
                program.parameters[name] = known[digest]  # its hash is computed already
        verify(program)
        if program.digest() != entry["digest"]:
            raise InputError("the entry is damaged")
        return program


def _names(program: Program) -> list[Any]:
    """What a program's digest leaves out and a pass may go by: sites and other provenance, names of parameters."""
    return [
        [name, node.target if node.op == "get_attr" else None, *(node.meta.get(key) for key in PROVENANCE)]
        for name, function in program.functions.items()
        for node in function.nodes
    ]


@functools.cache
def source_digest(cls: type[Pass]) -> str | None:
    """A hash of the packages that a pass and its bases are written in; None where there is no source to read."""
    sha = hashlib.sha256(torch.__version__.encode())
    for base in cls.__mro__[:-1]:
        files = list(_source_files(base.__module__))
        if not files:
            return None
        for file in files:
            sha.update(file.read_bytes())
    return sha.hexdigest()


def _source_files(module: str) -> Iterator[Path]:
    package = module.partition(".")[0]
    # of tersor itself only what passes stand on
    names = ("tersor.ir", "tersor.passes") if package == "tersor" else (package,)
    for name in names:
        root = sys.modules.get(name)
        for folder in getattr(root, "__path__", ()):
            yield from sorted(Path(folder).rglob("*.py"))
        if root is not None and not hasattr(root, "__path__") and (file := inspect.getsourcefile(root)):
            yield Path(file)


def _sorted_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
