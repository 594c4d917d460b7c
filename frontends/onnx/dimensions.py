"""The signature of a file: its inputs over named dimensions with ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersor.errors import InputError
from tersor.frontends.dynamic import DynamicSpec, read_entry
from tersor.frontends.onnx.reader import Input, Model
from tersor.ir import Dim, Range, Value

# An ONNX file names its dynamic sizes and does not say how large they may become.
DEFAULT_BATCH, DEFAULT_OTHER = Range(1, 8), Range(1, 512)


def read_signature(
    model: Model,
    dynamic: DynamicSpec | None,
    examples: Mapping[str, Any] | Sequence[Any] | None,
    limits: Mapping[str, Range],
) -> tuple[dict[str, Value], dict[str, Range], set[str]]:
    """Inputs by name, the ranges of the dimensions in their shapes, and the dimensions whose range was assumed.

    A size that the file names is a dimension of that name; what ``dynamic`` says about an axis goes for all axes of
    the same name in the file. Ranges that neither it nor the file gives are 1 to 8 for a batch (a first axis, unless
    its name says that it is a length) and 1 to 512 for any other, or up to the example's size where that is larger;
    ``limits`` are the ranges that what the model reads was found to allow.

    Raises:
        InputError: ``dynamic`` or the examples do not fit the file.
    """
    inputs = model.inputs
    names = {
        (i.name, axis): s if isinstance(s, str) else f"{i.name}.{axis}"
        for i in inputs
        for axis, s in enumerate(i.sizes)
        if not isinstance(s, int)
    }
    given = _given(inputs, dynamic or {}, names)
    dims = {key: given[name][0] if name in given else _identifier(name) for key, name in names.items()}
    ranges = {name: bounds for name, bounds in given.values()}
    for (_, axis), dim in dims.items():
        default = DEFAULT_BATCH if _is_batch(dim, axis) else DEFAULT_OTHER
        ranges.setdefault(dim, limits.get(dim) or model.ranges.get(dim, default))
    given_names = {name for name, _ in given.values()}
    _fit_examples(inputs, dims, ranges, given_names, examples)
    values = {}
    for i in inputs:
        shape: list[int | Dim] = []
        for axis, s in enumerate(i.sizes):
            if isinstance(s, int):
                shape.append(s)
                continue
            dim = dims[i.name, axis]
            fixed = ranges[dim].min == ranges[dim].max
            shape.append(ranges[dim].min if fixed else Dim.symbol(dim))
        values[i.name] = Value(i.dtype, tuple(shape))
    return values, {name: r for name, r in ranges.items() if r.min != r.max}, ranges.keys() - given_names


def _given(
    inputs: Sequence[Input], dynamic: DynamicSpec, names: Mapping[tuple[str, int], str]
) -> dict[str, tuple[str, Range]]:
    """For each of the file's names that ``dynamic`` speaks of: the caller's name and range."""
    by_name = {i.name: i for i in inputs}
    found: dict[str, tuple[str, Range]] = {}
    ranges: dict[str, Range] = {}
    for input_name, axes in dynamic.items():
        if input_name not in by_name:
            raise InputError(
                f"dynamic names the input {input_name!r}", why=f"the inputs are {', '.join(by_name)}"
            )
        sizes = by_name[input_name].sizes
        for axis, entry in axes.items():
            dim, low, high = read_entry(input_name, axis, entry)
            if not isinstance(axis, int) or not -len(sizes) <= axis < len(sizes):
                raise InputError(f"dynamic names axis {axis!r} of {input_name!r}", why=f"it has {len(sizes)}")
            axis %= len(sizes)
            bounds = Range(low, high)
            if isinstance(sizes[axis], int):
                if low == high == sizes[axis]:
                    continue
                raise InputError(
                    f"axis {axis} of {input_name!r} cannot be dynamic",
                    why=f"the file fixes its size at {sizes[axis]}",
                    fix="export the model again with a dynamic axis",
                )
            if ranges.setdefault(dim, bounds) != bounds:
                raise InputError(f"dimension {dim!r} has two ranges", why=f"{ranges[dim]} and {bounds}")
            name = names[input_name, axis]
            if found.setdefault(name, (dim, bounds)) != (dim, bounds):
                raise InputError(
                    f"dynamic calls one size {found[name][0]!r} and {dim!r}",
                    why=f"the file calls both {name!r}, so they are always equal",
                    fix="give them one name and one range",
                )
    return found


def _fit_examples(
    inputs: Sequence[Input],
    dims: Mapping[tuple[str, int], str],
    ranges: dict[str, Range],
    given: set[str],
    examples: Mapping[str, Any] | Sequence[Any] | None,
) -> None:
    """Checks the examples against the signature; ranges that nobody gave grow to hold them."""
    if examples is None:
        return
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if not isinstance(examples, Mapping):
        examples = dict(zip((i.name for i in inputs), examples, strict=False))
    names = [i.name for i in inputs]
    unknown = [n for n in examples if n not in names]
    missing = [n for n in names if n not in examples]
    if unknown or missing:
        raise InputError(
            "the example inputs do not fit the model",
            why=f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}",
            fix=f"the file's inputs are {', '.join(names)}",
        )
    sizes: dict[str, int] = {}
    for i in inputs:
        shape = tuple(getattr(examples[i.name], "shape", ()))
        if len(shape) != len(i.sizes):
            raise InputError(
                f"the example for {i.name!r} has shape {list(shape)}", why=f"the file has {list(i.sizes)}"
            )
        for axis, (have, want) in enumerate(zip(shape, i.sizes, strict=True)):
            if isinstance(want, int):
                if have != want:
                    raise InputError(
                        f"the example for {i.name!r} has size {have} on axis {axis}",
                        why=f"the file fixes it at {want}",
                    )
                continue
            dim = dims[i.name, axis]
            if sizes.setdefault(dim, have) != have:
                raise InputError(
                    f"dimension {dim!r} has two sizes in the example inputs: {sizes[dim]} and {have}"
                )
            bounds = ranges[dim]
            if dim not in given:
                ranges[dim] = bounds = Range(bounds.min, max(bounds.max, have))
            if not bounds.min <= have <= bounds.max:
                raise InputError(
                    f"the example for {i.name!r} has size {have} on axis {axis}",
                    why=f"{dim} ranges from {bounds.min} to {bounds.max}",
                    fix="widen the range or change the example",
                )


def _identifier(name: str) -> str:
    text = re.sub(r"\W", "_", name)
    return text if text.isidentifier() else f"dim_{text}"


def _is_batch(name: str, axis: int) -> bool:
    lowered = name.lower()
    return "batch" in lowered or (axis == 0 and not re.search("seq|len|time|tok", lowered))
