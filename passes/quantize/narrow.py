"""Linear layers whose operands are floats of 16 bits: what the passes for bf16 and fp16 share."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.value import DTYPES
from tersor.passes.base import PassResult
from tersor.passes.quantize.places import drop_unread, plain_weight, readers


class Narrowing:
    """Rounds operands of a program's linear layers: ``linear(x, w)`` -> ``linear(wide(narrow(x)), wide(narrow(w)))``.

    Layers of one input share its rounded form, layers of one weight its copy.

    Args:
        dtype: "bfloat16" or "float16". Of the latter's range (65504) inputs are limited to it, NaN stays, and weights
            beyond it are a reason to leave the layer alone.
        short: what reports and parameters call it.
        made_by: the pass.
    """

    def __init__(self, program: Program, dtype: str, short: str, made_by: str):
        self._program, self._dtype, self._short, self._made_by = program, dtype, short, made_by
        self._limit = torch.finfo(torch.float16).max if dtype == "float16" else None
        self._read_by = readers(program)
        self._rounded: dict[fx.Node, fx.Node] = {}
        self._stored: dict[str, str] = {}

    def apply(self, function: Function, linear: fx.Node, result: PassResult) -> None:
        """Rounds a layer's operands, or says why not."""
        before = linear.args[1].meta["value"].bytes
        if reason := self._narrow(function, linear):
            result.skip(linear, reason)
        else:
            said = f"weights and input in {self._short}"
            result.change(linear, said, bytes_before=before, bytes_after=before // 2)

    def finish(self) -> None:
        """Takes out what nothing reads any more."""
        drop_unread(self._program)

    def _narrow(self, function: Function, linear: fx.Node) -> str | None:
        weight = plain_weight(function, linear, self._read_by)
        if isinstance(weight, str):
            return weight
        if self._limit is not None and bool((weight.abs() > self._limit).any()):
            return f"its weight has values beyond {self._limit:.0f}, the largest in {self._short}"
        x, name = linear.args[0], linear.args[1].target
        build = function.builder(before=linear, made_by=self._made_by)
        if name not in self._stored:
            narrow = weight.to(DTYPES[self._dtype])
            self._stored[name] = function.parameters.add(f"{name}.{self._short}", narrow)
        if x not in self._rounded:
            limited = x
            if self._limit is not None:
                limited = build.minimum(build.maximum(x, -self._limit), self._limit)
            self._rounded[x] = build.cast(build.cast(limited, dtype=self._dtype), dtype="float32")
        wide = build.cast(build.read(self._stored[name]), dtype="float32")
        linear.args = (self._rounded[x], wide, *linear.args[2:])
        return None
