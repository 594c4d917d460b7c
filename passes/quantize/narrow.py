"""Linear layers and tables whose numbers are floats of 16 bits: what the passes for bf16 and fp16 share."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.matching import is_call
from tersor.ir.program import infer
from tersor.ir.value import DTYPES
from tersor.passes.base import PassResult
from tersor.passes.quantize.places import drop_unread, plain_weight, readers, small_table


class Narrowing:
    """Rounds operands of a program's linear layers, ``linear(x, w)`` -> ``linear(wide(narrow(x)), wide(narrow(w)))``,
    and tables, ``embedding(ids, t)`` -> ``wide(embedding(ids, narrow(t)))``; of attention by its ``products``.

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

    def apply(self, function: Function, layer: fx.Node, result: PassResult) -> None:
        """Rounds the operands of a linear layer or of attention, or the table of an embedding, or says why not."""
        if is_call(layer, "attention"):
            self._attend(layer, result)
            return
        before, table = layer.args[1].meta["value"].bytes, is_call(layer, "embedding")
        stored = self._store(function, layer)
        if isinstance(stored, str):
            result.skip(layer, stored)
            return
        (self._look_up if table else self._multiply)(function, layer, stored)
        said = f"{'table' if table else 'weights and input'} in {self._short}"
        result.change(layer, said, bytes_before=before, bytes_after=before // 2)

    def _attend(self, attention: fx.Node, result: PassResult) -> None:
        if (products := attention.kwargs.get("products", "float32")) != "float32":
            result.skip(attention, f"its products are in {products} already")
            return
        attention.kwargs = {**attention.kwargs, "products": self._dtype}
        result.change(attention, f"products in {self._short}")

    def finish(self) -> None:
        """Takes out what nothing reads any more."""
        drop_unread(self._program)

    def _store(self, function: Function, layer: fx.Node) -> fx.Node | str:
        """The weight of a layer in 16 bits, or why it stays as it is."""
        weight = plain_weight(function, layer, self._read_by)
        if isinstance(weight, str):
            return weight
        if is_call(layer, "embedding") and (reason := small_table(layer)):
            return reason
        if self._limit is not None and bool((weight.abs() > self._limit).any()):
            return f"its weight has values beyond {self._limit:.0f}, the largest in {self._short}"
        name = layer.args[1].target
        if name not in self._stored:
            narrow = weight.to(DTYPES[self._dtype])
            self._stored[name] = function.parameters.add(f"{name}.{self._short}", narrow)
        return function.builder(before=layer, made_by=self._made_by).read(self._stored[name])

    def _multiply(self, function: Function, linear: fx.Node, stored: fx.Node) -> None:
        build, x = function.builder(before=linear, made_by=self._made_by), linear.args[0]
        if x not in self._rounded:
            limited = x
            if self._limit is not None:
                limited = build.minimum(build.maximum(x, -self._limit), self._limit)
            self._rounded[x] = build.cast(build.cast(limited, dtype=self._dtype), dtype="float32")
        linear.args = (self._rounded[x], build.cast(stored, dtype="float32"), *linear.args[2:])

    def _look_up(self, function: Function, embedding: fx.Node, stored: fx.Node) -> None:
        embedding.args = (embedding.args[0], stored)
        embedding.meta["value"] = infer(embedding.target, embedding.args, embedding.kwargs)
        build = function.builder(before=embedding.next, like=embedding, made_by=self._made_by)
        function.replace(embedding, build.cast(embedding, dtype="float32"))
