"""Attention, of numbers and of codes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim
from tersor.ir.opset.rules import broadcast, require_dtype, require_float, show
from tersor.ir.value import DTYPES, Value

PRODUCTS = ("float32", "bfloat16", "float16", "uint8")

FP16_LIMIT = torch.finfo(torch.float16).max

WEIGHT_CODES = 255
"""Codes of the largest weight of a row where weights are rounded to 8 bits."""


def attention(
    q,
    k,
    v,
    mask=None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    products: str = "float32",
):
    """softmax(q k^T * scale + mask) v on merged heads (Vaswani et al. 2017, eq. 1).

    q [B, Tq, heads*D], k [B, Tk, kv_heads*D], v [B, Tk, kv_heads*Dv] -> [B, Tq, heads*Dv]. Each of the
    ``kv_heads`` groups serves heads/kv_heads query heads (GQA, Ainslie et al. 2023). ``mask`` broadcasts to
    [B, heads, Tq, Tk]: boolean (true = attend) or added to the scores. ``causal``: query i sees keys j <= i +
    Tk - Tq. ``window``: of those only j > i + Tk - Tq - window. ``softcap``: before the mask, a score s becomes
    softcap * tanh(s / softcap) (Gemma 2, 2024). ``products``: "bfloat16" rounds what both products multiply to bf16: q,
    k, v and exp(score - largest score), of which the sum that divides is not rounded; "float16" rounds them to fp16, q
    times the scale, and limits those beyond its range (65504) to it; "uint8" rounds
    exp(score - largest score) to multiples of 1/255, before it is added up too, while q, k and v come in codes, through
    `dequantize` (`integer_attention` is the same on the codes themselves). All else is as wide as q.
    """
    tq, tk = q.shape[1], k.shape[1]
    mask = _visible(mask, tq, tk, causal, window)
    q, k, v = _split(q, heads, tq), _split(k, kv_heads, tk), _split(v, kv_heads, tk)
    if softcap is None and products == "float32":
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
        )
    else:
        out = _spelled_out(q, k, v, mask, scale, softcap, products)
    return _merged(out)


def integer_attention(
    q,
    k,
    v,
    score_scale,
    value_scale,
    mask=None,
    *,
    heads: int,
    kv_heads: int,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
):
    """`attention` of codes, with both products exact in int32: uint8 with zero point 128 and a scale per head.

    q, k, v uint8, laid out as those of `attention`, as are the mask and the attributes; score_scale f32 [heads]: what a
    product of codes of q and k stands for, with the scale of the scores in it; value_scale f32 [kv_heads]; both are
    positive. With
    ``c = round(255 exp(score - largest score))`` the result is ``value_scale * sum(c (v - 128)) / sum(c)`` in f32.
    Sums stay below 2^31 for up to 65000 keys.
    """
    tq, tk, dtype = q.shape[1], k.shape[1], score_scale.dtype
    mask = _visible(mask, tq, tk, causal, window)
    # whole numbers up to 2^53 are exact in float64, for which torch has a matrix product
    q, k, v = (
        _split(x, n, t).double() - 128 for x, n, t in ((q, heads, tq), (k, kv_heads, tk), (v, kv_heads, tk))
    )
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(dtype) * score_scale.reshape(-1, 1, 1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights, hidden = _weights(scores, mask)
    codes = torch.round(weights * WEIGHT_CODES)
    total = codes.sum(-1, keepdim=True).masked_fill(hidden, 1.0)
    scale = value_scale.repeat_interleave(heads // kv_heads).reshape(-1, 1, 1)
    return _merged((codes.double() @ v).to(dtype) * (scale / total))


def _split(x: torch.Tensor, heads: int, length: int) -> torch.Tensor:
    """[B, T, H*D] -> [B, H, T, D]."""
    return x.reshape(x.shape[0], length, heads, -1).transpose(1, 2)


def _merged(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B, T, H*D]."""
    return x.transpose(1, 2).flatten(2)


def _visible(
    mask: torch.Tensor | None, tq: int, tk: int, causal: bool, window: int | None
) -> torch.Tensor | None:
    """The mask with what the diagonal and the window hide."""
    if not causal and window is None:
        return mask
    rows = torch.arange(tq).unsqueeze(1) + (tk - tq)
    columns = torch.arange(tk).unsqueeze(0)
    seen = columns <= rows if causal else torch.ones(tq, tk, dtype=torch.bool)
    if window is not None:
        seen = seen & (columns > rows - window)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def _spelled_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float,
    softcap: float | None, products: str,
) -> torch.Tensor:  # fmt: skip
    """Attention over [B, H, T, D]; as in torch's own, a row that hides every key gives 0."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if products not in ("bfloat16", "float16"):
            return x
        if products == "float16":
            x = x.clamp(-FP16_LIMIT, FP16_LIMIT)
        return x.to(DTYPES[products]).to(x.dtype)

    before, behind = (scale, 1.0) if products == "float16" else (1.0, scale)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = rounded(q * before) @ rounded(k).transpose(-1, -2)
    scores = scores * behind if softcap is None else softcap * torch.tanh(scores * (behind / softcap))
    weights, hidden = _weights(scores, mask)
    if products == "uint8":
        weights = torch.round(weights * WEIGHT_CODES)
    total = weights.sum(-1, keepdim=True).masked_fill(hidden, 1.0)
    return rounded(weights) @ rounded(v) / total


def _weights(scores: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(score - largest score) of each row, 0 for hidden keys; and which rows hide every key."""
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    largest = scores.amax(-1, keepdim=True)
    hidden = torch.isneginf(largest)
    return (scores - largest.masked_fill(hidden, 0.0)).exp(), hidden


def _infer_attention(
    q: Value, k: Value, v: Value, mask: Value | None = None, *, heads: int, kv_heads: int, scale: float,
    causal: bool = False, window: int | None = None, softcap: float | None = None, products: str = "float32",
) -> Value:  # fmt: skip
    if products not in PRODUCTS:
        raise ProgramError(f"attention: products in {products!r}", fix=f"use one of {', '.join(PRODUCTS)}")
    require_float("attention over", q)
    require_dtype(q.dtype, k=k, v=v, mask=mask if mask is None or mask.dtype != "bool" else None)
    return Value(q.dtype, _shape(q, k, v, mask, heads, kv_heads, softcap))


def _infer_integer_attention(
    q: Value, k: Value, v: Value, score_scale: Value, value_scale: Value, mask: Value | None = None, *,
    heads: int, kv_heads: int, causal: bool = False, window: int | None = None, softcap: float | None = None,
) -> Value:  # fmt: skip
    require_dtype("uint8", q=q, k=k, v=v)
    require_dtype("float32", score_scale=score_scale, value_scale=value_scale)
    require_dtype("float32", mask=mask if mask is None or mask.dtype != "bool" else None)
    if score_scale.shape != (heads,) or value_scale.shape != (kv_heads,):
        raise ProgramError(
            f"integer_attention: scales {score_scale} and {value_scale} are not one per head",
            why=f"{heads} heads of queries, {kv_heads} of keys and values",
        )
    return Value("float32", _shape(q, k, v, mask, heads, kv_heads, softcap))


def _shape(
    q: Value, k: Value, v: Value, mask: Value | None, heads: int, kv_heads: int, softcap: float | None
) -> tuple[int | Dim, ...]:
    """The shape of the result of operands that fit."""
    if softcap is not None and not softcap > 0:
        raise ProgramError(f"attention: a soft cap of {softcap} is not above 0")
    if not q.rank == k.rank == v.rank == 3 or k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0]:
        raise ProgramError(f"attention: q {q}, k {k}, v {v} do not fit")
    if heads % kv_heads or q.shape[2] % heads or k.shape[2] % kv_heads or v.shape[2] % kv_heads:
        raise ProgramError(
            f"attention: {heads} heads and {kv_heads} key heads do not divide q {q}, k {k}, v {v}"
        )
    if q.shape[2] // heads != k.shape[2] // kv_heads:
        raise ProgramError(
            f"attention: head size of q {q} ({heads} heads) and k {k} ({kv_heads} heads) differ"
        )
    scores = (q.shape[0], heads, q.shape[1], k.shape[1])
    if mask is not None and (mask.rank != 4 or broadcast(mask.shape, scores) != scores):
        raise ProgramError(f"attention: mask {mask} does not broadcast to {show(scores)}")
    return (*q.shape[:2], v.shape[2] // kv_heads * heads)


def _macs(
    result: Value, q: Value, k: Value, v: Value, *_: Any, heads: int, kv_heads: int, **__: Any
) -> int | Dim:
    pairs = q.shape[0] * q.shape[1] * k.shape[1] * heads
    return pairs * (q.shape[2] // heads) + pairs * (v.shape[2] // kv_heads)


ops.register(Op("attention", attention, _infer_attention, macs=_macs))
ops.register(Op("integer_attention", integer_attention, _infer_integer_attention, macs=_macs))
