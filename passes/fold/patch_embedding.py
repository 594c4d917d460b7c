"""Convolutions over patches that do not overlap are linear layers."""

from __future__ import annotations

from torch import fx

from tersor.ir import Function, Program
from tersor.ir.dims import Dim
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.windows import replace_by_layer


@register("fold.patch_embedding")
class FoldPatchEmbedding(Pass):
    """conv2d over patches  ->  linear over the pixels of each patch.

    Before:  %c = conv2d(%x, @w, @b, stride=(16, 16))
             %y = permute(reshape(%c, shape=(B, N, 196)), (0, 2, 1))
    After:   %p = reshape(permute(reshape(%x, shape=(B, 3, 14, 16, 14, 16)), (0, 2, 4, 1, 3, 5)), shape=(B, 196, 768))
             %y = linear(%p, @w', @b)                                                        @w' = @w as [N, 768]

    Legal when windows are as large as their steps and tile the image, in one group and without padding. What other
    passes know of linear layers (codes, fewer bits, sites) then holds for the patches too, and the result comes as the
    encoder reads it.

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1: the embedding is a linear projection of flattened patches.
    """

    numerics = Equivalent(1e-6)
    stage = "fold"
    acts_on = ("conv2d",)
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        for function, conv in self.select(program):
            reason = _unfit(function, conv)
            if reason:
                result.skip(conv, reason)
            else:
                result.change(conv, "a linear layer over patches")
                _rewrite(function, conv, self.name)
        program.drop_unused_parameters()
        return result


def _unfit(function: Function, conv: fx.Node) -> str | None:
    """Why a convolution is no linear layer over patches; None when it is one."""
    bound = conv.target.bind(conv.args, conv.kwargs)
    kernel = tuple(conv.args[1].meta["value"].shape[2:])
    if function.parameter(conv.args[1]) is None:
        return "its weight is computed"
    if bound["groups"] != 1 or tuple(bound["padding"]) != (0, 0) or tuple(bound["dilation"]) != (1, 1):
        return "it has groups, padding or dilation"
    if tuple(bound["stride"]) != kernel:
        return f"windows of {kernel} in steps of {tuple(bound['stride'])} overlap or leave gaps"
    if kernel == (1, 1):
        return "its windows are single pixels"
    sizes = conv.args[0].meta["value"].shape[2:]
    if any(isinstance(size, Dim) or size % k for size, k in zip(sizes, kernel, strict=True)):
        return f"its windows do not tile images of {sizes[0]} x {sizes[1]}"
    return None


def _rewrite(function: Function, conv: fx.Node, made_by: str) -> None:
    x, weight, bias = (*conv.args, None)[:3]
    (batch, channels, *sizes), (n, _, *kernel) = x.meta["value"].shape, weight.meta["value"].shape
    rows, columns = (size // k for size, k in zip(sizes, kernel, strict=True))
    build = function.builder(before=conv, made_by=made_by)
    apart = build.reshape(x, shape=(batch, channels, rows, kernel[0], columns, kernel[1]))
    patches = build.reshape(
        build.permute(apart, dims=(0, 2, 4, 1, 3, 5)),
        shape=(batch, rows * columns, channels * kernel[0] * kernel[1]),
    )
    flat = build.parameter(weight.target, function.parameter(weight).reshape(n, -1))
    replace_by_layer(function, conv, made_by, patches, flat, bias)
    function.erase_dead(weight)
