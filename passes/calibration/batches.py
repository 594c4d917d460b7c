"""Calibration data: batches in any of the usual forms, checked, kept for several readings, and split.

Part of the data is held out: passes fit to the rest and are judged on the part.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tersor.errors import InputError
from tersor.ir import Dim, Function, Value
from tersor.ir.interpreter import bind_dims

_FORMS = (
    "give a list, a DataLoader or any iterable of batches, each a dict of tensors or arrays by input name (or a tuple "
    "in the order of the inputs), one such dict, or a folder of .npz files"
)


@dataclass(frozen=True)
class Calibration:
    """Data to calibrate with, and how to read it.

    Attributes:
        batches: dicts of tensors or arrays by input name, or tuples in the order of the inputs, or bare tensors for a
            model of one input; in a list, a DataLoader or any iterable (a one-shot one is kept on disk while it is
            needed). One dict is one batch; a path is a folder of .npz files, one batch each, in order of their names.
        mask: the input, or a further entry of the batches, [batch, length], that is 0 at padding. Without it padding
            is what the model's own attention masks hide from every query (see `tersor.passes.calibration.padding`).
        held_out: fraction of the batches that passes are judged on and do not see, at least one where there are two.
        limit: how many batches to read at most.
    """

    batches: Any
    mask: str | None = None
    held_out: float = 0.2
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, str | Path):
            _npz_files(Path(self.batches))
        elif isinstance(self.batches, torch.Tensor | np.ndarray) or not isinstance(self.batches, Iterable):
            raise InputError(f"calibration data is a {type(self.batches).__name__}", fix=_FORMS)
        if not isinstance(self.held_out, int | float) or not 0 <= self.held_out < 1:
            raise InputError(f"held_out = {self.held_out!r}", fix="give a fraction from 0 on and below 1")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise InputError(f"limit = {self.limit!r}", fix="give a whole number of batches, at least one")
        if self.mask is not None and not isinstance(self.mask, str):
            raise InputError(
                f"mask is a {type(self.mask).__name__}",
                fix="give the name of an input, or of an entry of the batches",
            )

    @classmethod
    def of(cls, data: Any) -> Self:
        """``data`` itself, or calibration with these batches and the defaults.

        Raises:
            InputError: it is of none of the forms, or a folder without batches.
        """
        return data if isinstance(data, cls) else cls(data)


@dataclass(frozen=True)
class Batch:
    """One batch: inputs by name, and the mask [batch, length] where the user named one."""

    inputs: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None


Loader = Callable[[], Batch]


@dataclass
class Dataset:
    """Calibration data as it fits a function, in an order that does not change.

    Attributes:
        fit: batches to fit to.
        held_out: batches to judge by; those of ``fit`` where there is a single sample.
        digest: hash of all contents and of the split.
        notes: what a reader of results should know.
    """

    fit: Batches
    held_out: Batches
    digest: str
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def read(calibration: Calibration, function: Function) -> Dataset:
        """Reads everything once, checking it against the signature.

        Raises:
            InputError: there is no batch, or one does not fit: form, names, shapes, types, NaN or infinity.
        """
        reader = _Reader(calibration, function)
        found = reader.loaders()
        notes = []
        if len(found) == 1:
            name, load = found[0]
            found = [(name, part) for part in _halves(load, function, calibration.held_out)]
        count = len(found)
        kept_back = (
            0 if count < 2 or not calibration.held_out else max(1, round(count * calibration.held_out))
        )
        # evenly spread, so that data in some order is represented
        chosen = {count - 1 - i * count // kept_back for i in range(kept_back)}
        fit = [batch for i, batch in enumerate(found) if i not in chosen]
        held_out = [batch for i, batch in enumerate(found) if i in chosen]
        if not held_out:
            notes.append("no calibration data is held out: passes are judged on what they were fitted to")
        digest = hashlib.sha256(f"{reader.digest} {sorted(chosen)} {count}".encode()).hexdigest()
        return Dataset(Batches(fit, reader), Batches(held_out or fit, reader), digest, notes)


class Batches(Sequence[Batch]):
    """Batches that are loaded when they are looked at; ``names`` say which of the user's each of them is."""

    def __init__(self, named: list[tuple[str, Loader]], owner: object):
        self.names = [name for name, _ in named]
        self._loaders = [load for _, load in named]
        self._owner = owner  # has the folder that they are read from

    def __len__(self) -> int:
        return len(self._loaders)

    def __getitem__(self, index: int) -> Batch:
        return self._loaders[index]()


class _Reader:
    """Turns what the user gave into loaders of checked batches."""

    def __init__(self, calibration: Calibration, function: Function):
        self.calibration, self.function = calibration, function
        self._sha = hashlib.sha256(str(calibration.mask).encode())
        self._folder: tempfile.TemporaryDirectory | None = None

    @property
    def digest(self) -> str:
        return self._sha.hexdigest()

    def loaders(self) -> list[tuple[str, Loader]]:
        """Each batch's name, for errors, and what loads it."""
        found: list[tuple[str, Loader]] = []
        for index, (raw, source) in enumerate(itertools.islice(self._raw(), self.calibration.limit)):
            name = f"calibration batch {index}"
            if isinstance(source, Path):
                name += f" ({source})"
            batch = self._checked(raw, name)
            self._count(batch)
            if isinstance(source, Path):
                load = partial(self._reread, source, name)
            else:
                load = self._spool(batch, index) if source is _ONCE else lambda batch=batch: batch
            found.append((name, load))
        if not found:
            raise InputError("there are no calibration batches", fix=_FORMS)
        return found

    def _raw(self) -> Iterator[tuple[Any, Path | object]]:
        """Each batch as given, and where it is found again: its file, `_HELD` or `_ONCE`."""
        data = self.calibration.batches
        if isinstance(data, str | Path):
            for path in _npz_files(Path(data)):
                yield _read_npz(path), path
        elif isinstance(data, Mapping):
            yield data, _HELD
        elif isinstance(data, list | tuple):
            for raw in data:
                yield raw, _HELD
        else:
            for raw in data:
                yield raw, _ONCE

    def _reread(self, path: Path, name: str) -> Batch:
        return self._checked(_read_npz(path), name)

    def _checked(self, raw: Any, where: str) -> Batch:
        signature, mask_name = self.function.inputs, self.calibration.mask
        named = self._named(raw, where)
        extra = mask_name is not None and mask_name not in signature
        if unknown := sorted(named.keys() - signature.keys() - ({mask_name} if extra else set())):
            raise InputError(
                f"{where} has {', '.join(map(repr, unknown))}, which the program does not take",
                why=f"its inputs are {', '.join(map(repr, signature))}",
                fix="leave the others out of the batches",
            )
        if missing := [name for name in (*signature, *([mask_name] if extra else [])) if name not in named]:
            raise InputError(
                f"{where} lacks {', '.join(map(repr, missing))}", fix="every batch needs every input"
            )
        inputs = {name: _tensor(named[name], value, name, where) for name, value in signature.items()}
        try:
            sizes = bind_dims(signature, inputs)
        except InputError as error:
            fix, ran = error.fix, self.function.name
            if ran != "main":
                fix += f"; for another function than {ran!r} capture that one first, or with name='main'"
            raise InputError(error.what, where=where, why=error.why, fix=fix) from None
        for name, allowed in self.function.dims.items():
            if name in sizes and not allowed.min <= sizes[name] <= allowed.max:
                raise InputError(
                    f"dimension {name!r} is {sizes[name]}",
                    where=where,
                    why=f"the program was captured for {allowed.min} to {allowed.max}",
                    fix="give batches of such sizes, or capture with a wider range",
                )
        mask = None
        if mask_name is not None:
            mask = (
                inputs[mask_name] if mask_name in inputs else _as_tensor(named[mask_name], mask_name, where)
            )
            if mask.ndim != 2:
                raise InputError(
                    f"the mask {mask_name!r} has shape {list(mask.shape)}",
                    where=where,
                    fix="give one number per token, [batch, length], 0 at padding",
                )
        return Batch(inputs, mask)

    def _named(self, raw: Any, where: str) -> dict[str, Any]:
        """A batch's entries by name."""
        names = list(self.function.inputs)
        if isinstance(raw, Mapping):
            return dict(raw)
        if isinstance(raw, torch.Tensor | np.ndarray):
            raw = (raw,)
        if not isinstance(raw, list | tuple):
            raise InputError(f"{where} is a {type(raw).__name__}", fix=_FORMS)
        if any(isinstance(entry, Mapping) for entry in raw):
            raise InputError(
                f"{where} is a {type(raw).__name__} with a dict in it",
                fix="give the dict alone: what stands beside it, such as labels, is no input",
            )
        if len(raw) != len(names):
            raise InputError(
                f"{where} has {len(raw)} tensors, the program {len(names)} inputs",
                why=f"its inputs are {', '.join(map(repr, names))}",
                fix="give dicts by input name",
            )
        return dict(zip(names, raw, strict=True))

    def _count(self, batch: Batch) -> None:
        for name, tensor in (*batch.inputs.items(), ("", batch.mask)):
            if tensor is not None:
                self._sha.update(f"{name} {Value.of(tensor)}".encode())
                self._sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def _spool(self, batch: Batch, index: int) -> Loader:
        """Writes a batch that can be had only once to disk; the folder goes with the dataset."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tersor-calibration-")
        path = Path(self._folder.name, f"{index:06}.safetensors")
        tensors = {f"input.{name}": t.contiguous().clone() for name, t in batch.inputs.items()}
        if batch.mask is not None:
            tensors["mask"] = batch.mask.contiguous().clone()
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                "calibration data cannot be kept on disk",
                where=self._folder.name,
                why=str(error),
                fix="make room there, point TMPDIR elsewhere, or give a list",
            ) from None

        return partial(_load_spooled, path, tuple(batch.inputs))


def _load_spooled(path: Path, names: tuple[str, ...]) -> Batch:
    held = load_file(path)
    return Batch({name: held[f"input.{name}"] for name in names}, held.get("mask"))


_HELD, _ONCE = object(), object()
"""Stand for a batch that the user keeps in memory anyway, and for one that can be had only once."""


def _npz_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder", fix="give a folder of .npz files, one batch each")
    if not (files := sorted(folder.glob("*.npz"))):
        raise InputError(
            f"there is no .npz file in {str(folder)!r}", fix="write one per batch with numpy.savez"
        )
    return files


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            "a calibration file cannot be read",
            where=str(path),
            why=str(error),
            fix="write it with numpy.savez(path, input_ids=..., attention_mask=...)",
        ) from None


def _as_tensor(given: Any, name: str, where: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name!r} is no tensor", where=where, why=str(error), fix="give torch tensors or numpy arrays"
        ) from None
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "a meta tensor" if tensor.is_meta else f"of layout {tensor.layout}"
        raise InputError(f"{name!r} is {kind}", where=where, fix="give dense tensors, with values")
    return tensor.cpu()


def _tensor(given: Any, value: Value, name: str, where: str) -> torch.Tensor:
    """A tensor of the signature's type, without NaN and infinity."""
    tensor = _as_tensor(given, name, where)
    if tensor.is_floating_point() != value.is_float or tensor.is_complex():
        raise InputError(f"{name!r} is {tensor.dtype}", where=where, fix=f"the program takes {value}")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise InputError(f"{name!r} holds NaN or infinity", where=where, fix="leave such samples out")
    return tensor.to(value.torch_dtype)


def _halves(load: Loader, function: Function, held_out: float) -> list[Loader]:
    """A single batch cut in two along its first dimension, where all inputs share that and it may vary."""
    batch = load()
    first = {value.shape[0] if value.shape else None for value in function.inputs.values()}
    dim = next(iter(first))
    if len(first) != 1 or not isinstance(dim, Dim) or not dim.is_symbol or not held_out:
        return [load]
    count, smallest = next(iter(batch.inputs.values())).shape[0], function.dims[str(dim)].min
    cut = count - max(smallest, round(count * held_out))
    if cut < smallest:
        return [load]

    def part(rows: slice) -> Batch:
        whole = load()
        mask = whole.mask[rows] if whole.mask is not None and len(whole.mask) == count else whole.mask
        return Batch({name: tensor[rows] for name, tensor in whole.inputs.items()}, mask)

    return [lambda: part(slice(0, cut)), lambda: part(slice(cut, count))]
