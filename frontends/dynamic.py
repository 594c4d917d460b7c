"""Named dynamic dimensions as the caller writes them: ``{"x": {0: ("batch", 1, 8), 1: ("length", 1, 512)}}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from tersor.errors import InputError
from tersor.ir import Range

DynamicSpec = Mapping[str, Mapping[int, tuple[str, int, int]]]
_FORM = '{"x": {0: ("batch", 1, 8)}}, by input and axis, each a name, the smallest and the largest size'


@dataclass(frozen=True)
class DynamicDims:
    """Checked dynamic dimensions.

    Attributes:
        axes: input name -> axis -> dimension name.
        ranges: dimension name -> sizes it may take.
        traced: dimension name -> size to trace with.
        example: dimension name -> size in the example inputs, or the nearest one in the range.
    """

    axes: dict[str, dict[int, str]]
    ranges: dict[str, Range]
    traced: dict[str, int]
    example: dict[str, int]

    def enlarge(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Example inputs tiled or cut to the sizes to trace with."""
        result = dict(tensors)
        for name, axes in self.axes.items():
            for axis, dim in axes.items():
                have, want = result[name].shape[axis], self.traced[dim]
                if have != want:
                    result[name] = result[name].index_select(axis, torch.arange(want) % have)
        return result


def read_dynamic(spec: DynamicSpec, tensors: Mapping[str, torch.Tensor]) -> DynamicDims:
    """Checks the caller's dynamic dimensions against the example inputs.

    Raises:
        InputError: an unknown input or axis, an impossible range, an example outside it, sizes that disagree.
    """
    axes: dict[str, dict[int, str]] = {}
    ranges: dict[str, Range] = {}
    found: dict[str, int] = {}
    if not isinstance(spec, Mapping) or not all(isinstance(dims, Mapping) for dims in spec.values()):
        raise InputError(f"dynamic is {spec!r}", fix=f"name the sizes that vary: {_FORM}")
    for name, dims in spec.items():
        if name not in tensors:
            raise InputError(
                f"dynamic names the input {name!r}",
                why="there is no such tensor among the example inputs",
                fix=f"use their names: {', '.join(tensors)}",
            )
        for axis, entry in dims.items():
            dim, low, high = read_entry(name, axis, entry)
            shape = tuple(tensors[name].shape)
            if not _whole(axis) or not -len(shape) <= axis < len(shape):
                raise InputError(
                    f"dynamic names axis {axis!r} of {name!r}",
                    why=f"the example's shape is {list(shape)}",
                    fix="give the number of one of its axes, counted from 0",
                )
            axis, size = axis % len(shape), shape[axis]
            if ranges.setdefault(dim, Range(low, high)) != Range(low, high):
                raise InputError(
                    f"dimension {dim!r} has two ranges",
                    why=f"{ranges[dim].min} to {ranges[dim].max}, and {low} to {high}",
                    fix="axes that share a name have one size: give them one range, or different names",
                )
            if found.setdefault(dim, size) != size:
                raise InputError(
                    f"dimension {dim!r} has two sizes in the example inputs: {found[dim]} and {size}",
                    fix="give the axes different names, or examples of one size",
                )
            # a size of 1 is enlarged to trace with, which a dimension of one size is not
            if not low <= size <= high and (size != 1 or low == high):
                raise InputError(
                    f"the example for {name!r} has size {size} on axis {axis}",
                    why=f"{dim} ranges from {low} to {high}",
                    fix="widen the range or change the example",
                )
            axes.setdefault(name, {})[axis] = dim
    static = {dim for dim, r in ranges.items() if r.min == r.max}
    for name in axes:
        axes[name] = {axis: dim for axis, dim in axes[name].items() if dim not in static}
    ranges = {dim: r for dim, r in ranges.items() if dim not in static}
    example = {dim: max(found[dim], r.min) for dim, r in ranges.items()}
    return DynamicDims(axes, ranges, _traced_sizes(ranges, found, tensors, axes), example)


def export_dims(dims: DynamicDims, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The same as torch.export wants it."""
    torch_dims = {n: torch.export.Dim(n, min=r.min, max=r.max) for n, r in dims.ranges.items()}
    return {
        name: {axis: torch_dims[dim] for axis, dim in dims.axes.get(name, {}).items()} or None
        for name in tensors
    }


def read_entry(name: str, axis: Any, entry: Any) -> tuple[str, int, int]:
    """One (dimension name, smallest, largest) as the caller wrote it.

    Raises:
        InputError: it is none.
    """
    well_formed = (
        isinstance(entry, tuple | list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and entry[0].isidentifier()
        and all(_whole(bound) for bound in entry[1:])
    )
    if not well_formed or not 1 <= entry[1] <= entry[2]:
        raise InputError(
            f"dynamic dimension {axis} of {name!r} is {entry!r}",
            fix='give (name, smallest, largest), for example ("length", 1, 512)',
        )
    return tuple(entry)


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _traced_sizes(
    ranges: Mapping[str, Range],
    found: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor],
    axes: Mapping[str, Mapping[int, str]],
) -> dict[str, int]:
    """A size for each name that no other name and no static axis has.

    torch.export takes a size of 1 for a constant, and two equal sizes can make it believe that they always are.
    """
    taken = {
        size
        for name, t in tensors.items()
        for axis, size in enumerate(t.shape)
        if axis not in axes.get(name, {})
    }
    chosen: dict[str, int] = {}
    for dim, bounds in ranges.items():
        wishes = chain([found[dim]], range(max(bounds.min, 2), bounds.max + 1))
        chosen[dim] = next(
            (s for s in wishes if s > 1 and s >= bounds.min and s not in taken), max(bounds.max, 2)
        )
        taken.add(chosen[dim])
    return chosen
