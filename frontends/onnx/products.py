"""Scales that follow a product of integers become the scales of its codes.

Files with dynamic quantization multiply whole numbers (MatMulInteger) and their result by both scales afterwards. In a
program codes are decoded first, with their scales, and a product is one of decoded values.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import replace

import torch
from torch import fx

from tersor.frontends.onnx.codes import Encoded
from tersor.ir.matching import is_call
from tersor.ir.program import Function

_MOVES = ("reshape", "permute")


def scale_products(function: Function, encoded: MutableMapping[str, Encoded]) -> None:
    """((a - p) @ (W - q)) * s * t  ->  ((a - p) * s) @ ((W - q) * t), where a was encoded with the scale s.

    Args:
        encoded: how parameters come from codes; those of the scaled weights are entered.
    """
    function.erase_dead(*function.calls("cast"))  # to integers and back
    for product in function.calls("matmul"):
        a, weight = product.args
        if not is_call(a, "dequantize") or not _is_one(a.args[1]) or weight.op != "get_attr":
            continue
        whole, made = encoded.get(weight.target), _maker(a.args[0])
        found = None if whole is None or made is None else _scales(function, product, made.args[1])
        if found is None:
            continue
        last, numbers = found
        scaled = whole.then("Mul", numbers)
        if scaled is None:
            continue
        build = function.builder(before=last, like=product)
        x = build.dequantize(a.args[0], made.args[1], *a.args[2:], **a.kwargs)
        readers = [n for n in function.graph.find_nodes(op="get_attr") if n.target == weight.target]
        if sum(len(n.users) for n in readers) == 1:
            del function.parameters[
                weight.target
            ]  # nobody else needs the whole numbers: the scaled ones take the name
        stored = build.parameter(weight.target, scaled.decoded())
        encoded[stored.target] = replace(scaled, name=stored.target)
        function.replace(last, build.matmul(x, stored))


def _is_one(scale: fx.Node) -> bool:
    return is_call(scale, "full") and scale.kwargs["value"] == 1


def _maker(codes: fx.Node) -> fx.Node | None:
    """The `quantize` with one scale for all that codes come from, through changes of their layout."""
    while is_call(codes, *_MOVES):
        codes = codes.args[0]
    return codes if is_call(codes, "quantize") and not codes.args[1].meta["value"].rank else None


def _scales(function: Function, product: fx.Node, scale: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
    """The last of the multiplications behind a product that together are by ``scale`` and stored numbers, and the
    product of these."""
    here, seen, numbers = product, False, torch.ones(())
    while not seen:
        if len(here.users) != 1 or not is_call(user := next(iter(here.users)), "mul"):
            return None
        for factor in _factors([x for x in user.args if x is not here]):
            if factor is scale and not seen:
                seen = True
                continue
            known = torch.tensor(factor) if isinstance(factor, float) else function.parameter(factor)
            if known is None or math.prod(known.shape[:-1]) != 1:
                return None
            numbers = numbers * known.float().reshape(known.shape[-1:])
        here = user
    return here, numbers


def _factors(operands: list[fx.Node | float]) -> list[fx.Node | float]:
    """What is multiplied, through products of single numbers and rows."""
    found, stack = [], list(operands)
    while stack:
        x = stack.pop()
        if is_call(x, "mul"):
            stack += x.args
        elif is_call(x, "reshape") and x.meta["value"].elements == 1 or is_call(x, "cast"):
            stack.append(x.args[0])
        else:
            found.append(float(x) if isinstance(x, int) else x)
    return found
