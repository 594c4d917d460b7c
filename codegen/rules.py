"""How each operation becomes kernel calls."""

from __future__ import annotations

from torch import fx
from tvm import relax

from tersor.codegen import tiles
from tersor.codegen.fusion import Group, build_chain
from tersor.codegen.kernels.chain import Chain, ChainInput, Step
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.lowering import Lowering, opaque, register_lowering
from tersor.codegen.weights import Weight
from tersor.ir.dims import Shape


def lower_group(lowering: Lowering, group: Group) -> relax.Expr:
    """A group of the fusion plan: a GEMM with an epilogue, or element-wise work by itself."""
    chain, feeds = build_chain(group)
    value = group.root.meta["value"]
    if not group.anchors:
        shapes = tuple(opaque(feed.meta["value"].shape) for feed in feeds)
        kernel = Elementwise(chain, shapes, opaque(value.shape))
        return lowering.call(kernel, [lowering.value(feed) for feed in feeds], [value.shape])
    weights = [anchor.args[1] for anchor in group.anchors]
    n, k = weights[0].meta["value"].shape
    panel = tiles.panel_width(lowering.target)
    gemm = Gemm(opaque(value.shape[:-1]), k, n, chain, panel, len(weights))
    packed = lowering.weight(
        Weight(tuple(w.target for w in weights), panel, "beside" if len(weights) > 1 else "stacked")
    )
    extra = [lowering.view(feed, spec.shape) for feed, spec in zip(feeds, gemm.inputs()[2:], strict=True)]
    return lowering.call(gemm, [lowering.value(group.anchors[0].args[0]), packed, *extra], [value.shape])


def copy_kernel(shape: Shape, dtype: str) -> Elementwise:
    """Writes its input to new memory."""
    return Elementwise(Chain((ChainInput("full", dtype),), (), (0,)), (shape,), shape)
