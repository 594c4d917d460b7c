"""How each operation becomes kernel calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from tvm import relax

from tersor.codegen import fusion, tiles
from tersor.codegen.kernels import layout
from tersor.codegen.kernels.attention import Attention
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.batched_gemm import BatchedGemm
from tersor.codegen.kernels.cache import CacheUpdate
from tersor.codegen.kernels.chain import Chain, ChainInput, Const, Step
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.codegen.kernels.embedding import Decoding, Embedding
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.norm import PLAIN, LayerNorm, Reduce, RMSNorm
from tersor.codegen.kernels.quantize import DynamicQuantize
from tersor.codegen.kernels.scan import ArgMax, ArgSort, CumSum, Scatter
from tersor.codegen.kernels.softmax import Softmax
from tersor.codegen.kernels.window import DepthwiseConv, Pool, Window
from tersor.codegen.lowering import Lowering, copy_kernel, opaque, register_lowering
from tersor.codegen.weights import Weight
from tersor.errors import CompileError
from tersor.ir.dims import Dim, Shape, product
from tersor.ir.matching import is_call
from tersor.ir.value import Value
from tersor.ir.verifier import describe

BIAS = Chain((ChainInput("accumulator"), ChainInput("column")), (Step("add", (0, 1)),), (2,))


def _projection(
    lowering: Lowering, x: relax.Expr, lead: Shape, weight: Weight, n: int, k: int, bias: Weight | None
) -> relax.Expr:
    """x @ weight.T + bias, for weights that a rule puts together itself."""
    gemm = Gemm(opaque(lead), k, n, *([BIAS] if bias else []), panel=weight.panel)
    args = [x, lowering.weight(weight), *([lowering.weight(bias)] if bias else [])]
    return lowering.call(gemm, args, [(*lead, n)])


# -- a Transformer's own


@register_lowering("layer_norm")
def _layer_norm(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _norm(lowering, node, LayerNorm)


@register_lowering("rms_norm")
def _rms_norm(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _norm(lowering, node, RMSNorm)


def _norm(lowering: Lowering, node: fx.Node, kernel: type[LayerNorm] | type[RMSNorm]) -> relax.Expr:
    """The norm, and its tail in the same kernel."""
    x, weight, bias = (*node.args, None, None)[:3]
    shape, tail = node.meta["value"].shape, lowering.plan.tails.get(node, fusion.Tail())
    chain, feeds = _epilogue(node, tail)
    if tail.scale:
        chain = replace(chain, outputs=(0, 0) if tail.kept else (0,))
    rows = [tail.scale.meta["value"].shape] if tail.scale else []
    norm = kernel(opaque(shape[:-1]), shape[-1], node.kwargs.get("eps", node.target.attributes["eps"]),
                  weight is not None, bias is not None, epilogue=chain, scales=rows[0][-1] if rows else 0)  # fmt: skip
    args = [lowering.value(a) for a in (x, weight, bias) if a is not None]
    args += [lowering.view(f, s.shape) for f, s in zip(feeds, norm.inputs()[len(args) :], strict=True)]
    results = lowering.call(norm, args, [shape, *rows, *[shape] * (len(chain.outputs) - 1)])
    if not tail.nodes:
        return results
    results = results if isinstance(results, list) else [results]
    if tail.group:
        lowering.define(tail.group.root, results[-1])
        return results[0]
    _define_codes(lowering, tail.scale, tail.codes, *results[:2])
    return results[-1]


def _epilogue(node: fx.Node, tail: fusion.Tail) -> tuple[Chain, list[fx.Node]]:
    """The element-wise work of a tail behind a norm or an attention, its own value first where others read it."""
    if not tail.group:
        return PLAIN, []
    chain, feeds = fusion.build_chain(tail.group, node)
    return replace(chain, outputs=(0, *chain.outputs)) if tail.kept else chain, feeds


def _define_codes(
    lowering: Lowering, node: fx.Node, same: tuple[fx.Node, ...], codes: relax.Expr, scale: relax.Expr
) -> None:
    lowering.define(node, scale)
    for other in same:
        lowering.define(other, codes)


@register_lowering("dynamic_scale", when=fusion.is_token_scale)
def _dynamic_scale(lowering: Lowering, node: fx.Node) -> relax.Expr:
    """The scales of every row and its codes, which one kernel makes."""
    tail, shape, scales = (
        lowering.plan.tails[node],
        node.args[0].meta["value"].shape,
        node.meta["value"].shape,
    )
    kernel, feeds = DynamicQuantize(opaque(shape[:-1]), shape[-1], scales=scales[-1]), [node.args[0]]
    if tail.group:
        chain, feeds = fusion.build_chain(tail.group)
        kernel = replace(kernel, chain=chain)
    args = [lowering.view(f, s.shape) for f, s in zip(feeds, kernel.inputs(), strict=True)]
    codes, scale = lowering.call(kernel, args, [shape, scales])
    _define_codes(lowering, node, tail.codes, codes, scale)
    return scale


@register_lowering("quantize", when=fusion.is_token_codes)
def _token_codes(lowering: Lowering, node: fx.Node) -> relax.Expr:
    """The kernel of their scale has made them."""
    return lowering.value(node)


@register_lowering("embedding")
def _embedding(lowering: Lowering, node: fx.Node) -> relax.Expr:
    ids, table = node.args
    (count, size), dtype = table.meta["value"].shape, table.meta["value"].dtype
    widened = [user for user in node.users if fusion.is_widened_rows(user)]
    if isinstance(count, Dim) or isinstance(size, Dim) or not (widened or dtype == "float32"):
        return _selection(lowering, node, layout.IndexSelect, table, ids, 0)
    panel = 0
    if table.op == "get_attr":
        panel = tiles.panel_width(lowering.target) if _packed_for(lowering, table, "linear") else 0
        stored = lowering.weight(Weight((table.target,), panel or None))
    else:
        stored = lowering.value(table)
    kernel = Embedding(opaque(ids.meta["value"].shape), count, size, panel, dtype)
    rows = lowering.call(kernel, [lowering.value(ids), stored], [node.meta["value"].shape])
    for cast in widened:
        lowering.define(cast, rows)
    return rows


@register_lowering("dequantize", when=fusion.is_decoded_rows)
def _decoded_rows(lowering: Lowering, node: fx.Node) -> relax.Expr:
    """Rows of a table of codes, decoded by the kernel that looks them up."""
    (ids, table), scale, zero = node.args[0].args, *(*node.args, None)[1:3]
    (count, size), per_row = table.meta["value"].shape, is_call(scale, "index_select")
    codes = Decoding(table.meta["value"].dtype, per_row, float(zero or 0))
    layer = _packed_for(lowering, table, "integer_linear", "grouped_integer_linear")
    panel, words = (tiles.panel_width(lowering.target), lowering.words(layer)) if layer else (0, None)
    kernel = Embedding(opaque(ids.meta["value"].shape), count, size, panel, codes=codes, words=words)
    stored = lowering.weight(Weight((table.target,), panel or None, words=words))
    args = [lowering.value(ids), stored, lowering.value(scale.args[0] if per_row else scale)]
    return lowering.call(kernel, args, [node.meta["value"].shape], of=node.args[:1])


def _packed_for(lowering: Lowering, table: fx.Node, *operations: str) -> fx.Node | None:
    """A tied output projection, for which a table is packed, so that its copy is read."""
    layers = lowering.function.calls(*operations)
    return next((layer for layer in layers if layer.args[1].target == table.target), None)


@register_lowering("rotary_embedding")
def _rotary_embedding(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, cos, sin = node.args
    batch, length, width = opaque(x.meta["value"].shape)
    heads, angles = node.kwargs["heads"], cos.meta["value"].shape
    kernel = layout.Rotary(
        batch,
        length,
        heads,
        width // heads,
        angles[-1],
        node.kwargs.get("interleaved", False),
        angles[0] == 1,
    )
    shape = node.meta["value"].shape
    turned = lowering.call(
        kernel, [lowering.value(a) for a in node.args], [(*shape[:2], heads, width // heads)]
    )
    return lowering.reshape(turned, shape)


@register_lowering("integer_attention")
@register_lowering("attention")
def _attention(lowering: Lowering, node: fx.Node) -> relax.Expr:
    """Products of codes take the scales of the heads behind their operands."""
    at = node.target.operands.index("mask")
    (q, k, v), scales, mask = node.args[:3], node.args[3:at], (*node.args, None)[at]
    (batch, q_len, width), kv_len = opaque(q.meta["value"].shape), opaque(k.meta["value"].shape)[1]
    heads, kv_heads = node.kwargs["heads"], node.kwargs["kv_heads"]
    joined, tail = lowering.plan.joined.get(node), lowering.plan.tails.get(node, fusion.Tail())
    dtype = q.meta["value"].dtype
    products = "uint8" if scales else node.kwargs.get("products", "float32")
    if joined and products == "bfloat16":  # what the products round anyway travels in half the bytes
        joined, dtype = fusion.narrowed(joined), "bfloat16"
    epilogue, feeds = _epilogue(node, tail)
    kernel = Attention(
        batch,
        q_len,
        kv_len,
        heads,
        kv_heads,
        width // heads,
        v.meta["value"].shape[-1] // kv_heads,
        node.kwargs.get("scale", 1.0),
        causal=node.kwargs.get("causal", False),
        window=node.kwargs.get("window"),
        mask=None if mask is None else opaque(mask.meta["value"].shape),
        mask_dtype="bool" if mask is None else mask.meta["value"].dtype,
        packed="qkv" if joined else "",
        softcap=node.kwargs.get("softcap"),
        dtype=dtype,
        products=products,
        epilogue=epilogue,
    )
    args = [_joined(lowering, joined)] if joined else [lowering.value(a) for a in (q, k, v)]
    args += [lowering.value(x) for x in (*scales, mask) if x is not None]
    args += [lowering.view(f, s.shape) for f, s in zip(feeds, kernel.inputs()[len(args) :], strict=True)]
    results = lowering.call(kernel, args, [node.meta["value"].shape] * len(epilogue.outputs))
    if not tail.group:
        return results
    results = results if isinstance(results, list) else [results]
    lowering.define(tail.group.root, results[-1])
    return results[0]


def _joined(lowering: Lowering, joined: fusion.Joined) -> relax.Expr:
    """Linear layers of one input as one, their outputs side by side."""
    x, sizes = (
        lowering.plan.left_matrix(joined.anchors[0]),
        [a.meta["value"].shape[-1] for a in joined.anchors],
    )
    value, n = x.meta["value"], sum(sizes)
    gemm = lowering.gemm(joined.anchors[0], n, joined.chain)
    sources = tuple(fusion.stored_weight(a).target for a in joined.anchors)
    weight = lowering.weight(Weight(sources, gemm.panel, words=gemm.words))
    args = lowering.operands(joined.anchors[0], gemm, weight)
    for kind, operands, spec in zip(
        (i.kind for i in joined.chain.inputs[1:]), joined.feeds, gemm.inputs()[len(args) :], strict=True
    ):
        if kind == "column":
            parts = zip(sizes, operands, strict=True)
            args.append(lowering.weight(Weight(tuple(n if o is None else o.target for n, o in parts))))
        else:
            args.append(lowering.view(operands[0], spec.shape))
    return lowering.call(gemm, args, [(*value.shape[:-1], n)], of=joined.anchors)


@register_lowering("matmul")
def _matmul(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, y = node.args
    (a, b), rank = (opaque(n.meta["value"].shape) for n in node.args), node.meta["value"].rank
    # a transposition right before is read in place
    swap = (*range(rank - 2), rank - 1, rank - 2)
    transposed = y.op == "call_function" and y.target.name == "permute" and tuple(y.kwargs["dims"]) == swap
    if transposed:
        y = y.args[0]
        b = (*b[:-2], b[-1], b[-2])
    shapes = [(1,) * (rank - len(s)) + tuple(s) for s in (a, b)]
    kernel = BatchedGemm(*shapes, transposed=transposed)
    args = [lowering.view(n, s) for n, s in zip((x, y), shapes, strict=True)]
    return lowering.call(kernel, args, [node.meta["value"].shape])


@register_lowering("grouped_integer_linear", when=fusion.is_anchor)
@register_lowering("integer_linear")
@register_lowering("linear")
def _linear(lowering: Lowering, node: fx.Node) -> relax.Expr:
    """A linear layer whose weight is computed; stored weights are anchors of groups."""
    raise CompileError(
        "a linear layer's weight is computed at run time",
        where=describe(node),
        why="kernels read weights that were packed at compile time",
        fix="use matmul for products of two computed values",
    )


@register_lowering("conv1d")
def _conv1d(lowering: Lowering, node: fx.Node) -> relax.Expr:
    """A convolution over one dimension is one over an image that is one row high."""
    along = {key: _attribute(node, key) for key in ("stride", "padding", "dilation")}
    windows = {key: (0 if key == "padding" else 1, value) for key, value in along.items()}
    return _convolution(lowering, node, **windows)


@register_lowering("conv2d")
def _conv2d(lowering: Lowering, node: fx.Node) -> relax.Expr:
    windows = {key: tuple(_attribute(node, key)) for key in ("stride", "padding", "dilation")}
    return _convolution(lowering, node, **windows)


def _attribute(node: fx.Node, name: str) -> Any:
    return node.kwargs.get(name, node.target.attributes[name])


def _convolution(lowering: Lowering, node: fx.Node, *, stride, padding, dilation) -> relax.Expr:
    """The weight times the windows as columns, group by group; channels by themselves have a kernel of their own."""
    x, weight, bias = (*node.args, None)[:3]
    groups, value = _attribute(node, "groups"), node.meta["value"]
    batch, n, *windows = value.shape if value.rank == 4 else (*value.shape[:2], 1, value.shape[2])
    image = _image(x.meta["value"].shape)
    kernel = _image(weight.meta["value"].shape)[2:]
    source = lowering.view(x, image)
    source, image = _padded(lowering, source, image, padding, 0.0)
    if groups > 1 and groups == image[1]:
        window = Window(kernel, opaque(tuple(windows)), stride, dilation)
        made = DepthwiseConv(opaque(image), n, window, bias is not None)
        args = [source, lowering.view(weight, (n, 1, *kernel)), *([lowering.value(bias)] if bias else [])]
        return lowering.reshape(lowering.call(made, args, [(batch, n, *windows)]), value.shape)
    columns, k = (
        (batch, groups, image[1] // groups * product(kernel), product(windows)),
        weight.meta["value"].shape,
    )
    if (kernel, stride) != ((1, 1), (1, 1)):
        unfold = layout.Unfold(opaque(image), kernel, opaque(tuple(windows)), stride, dilation)
        source = lowering.call(unfold, [source], [(*image[:2], *kernel, *windows)])
    rows = (1, groups, n // groups, product(k[1:]))
    gemm = BatchedGemm(rows, opaque(columns))
    args = [lowering.reshape(lowering.value(weight), rows), lowering.reshape(source, columns)]
    out = lowering.call(gemm, args, [(batch, groups, n // groups, product(windows))])
    out = lowering.reshape(out, (batch, n, product(windows)))
    if bias is not None:
        shape = opaque((batch, n, product(windows)))
        chain = Chain((ChainInput("full"), ChainInput("row")), (Step("add", (0, 1)),), (2,))
        add = Elementwise(chain, (shape, (n, 1)), shape)
        out = lowering.call(
            add, [out, lowering.reshape(lowering.value(bias), (n, 1))], [(batch, n, product(windows))]
        )
    return lowering.reshape(out, value.shape)


def _image(shape: Shape) -> Shape:
    """A shape with two spatial dimensions, from one with one or two."""
    return shape if len(shape) == 4 else (*shape[:2], 1, shape[2])


def _padded(
    lowering: Lowering, x: relax.Expr, shape: Shape, padding: tuple[int, int], fill: float
) -> tuple[relax.Expr, Shape]:
    """An image [B, C, H, W] with so much around it, and its shape."""
    if padding == (0, 0):
        return x, shape
    pads = ((0, 0), (0, 0), *((p, p) for p in padding))
    wide = tuple(size + a + b for size, (a, b) in zip(shape, pads, strict=True))
    return lowering.call(layout.Pad(opaque(shape), pads, fill), [x], [wide]), wide


@register_lowering("max_pool2d")
def _max_pool2d(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _pool(lowering, node, "max", float("-inf"), tuple(_attribute(node, "dilation")), (0, 0))


@register_lowering("avg_pool2d")
def _avg_pool2d(lowering: Lowering, node: fx.Node) -> relax.Expr:
    left_out = (0, 0) if _attribute(node, "count_padding") else tuple(_attribute(node, "padding"))
    return _pool(lowering, node, "mean", 0.0, (1, 1), left_out)


def _pool(lowering: Lowering, node: fx.Node, kind, fill: float, dilation, left_out) -> relax.Expr:
    x, shape = node.args[0], node.meta["value"].shape
    padding = tuple(_attribute(node, "padding"))
    source, image = _padded(lowering, lowering.value(x), x.meta["value"].shape, padding, fill)
    window = Window(tuple(node.kwargs["kernel"]), opaque(shape[2:]), tuple(node.kwargs["stride"]), dilation)
    return lowering.call(Pool(kind, opaque(image), window, left_out), [source], [shape])


@register_lowering("resample")
def _resample(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, positions, _ = (a.meta["value"] for a in node.args)
    length, taps = opaque(positions.shape)
    kernel = layout.Resample(opaque(x.shape), node.kwargs["dim"] % x.rank, length, taps)
    return lowering.call(kernel, [lowering.value(a) for a in node.args], [node.meta["value"].shape])


# -- reductions


@register_lowering("softmax")
def _softmax(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _along_last(lowering, node, Softmax)


@register_lowering("log_softmax")
def _log_softmax(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _along_last(lowering, node, lambda shape: Softmax(shape, log=True))


def _along_last(lowering: Lowering, node: fx.Node, kernel) -> relax.Expr:
    """A kernel over the last dimension, applied along ``dim``."""
    x, value = lowering.value(node.args[0]), node.meta["value"]
    dim = node.kwargs["dim"] % value.rank
    if dim == value.rank - 1:
        return lowering.call(kernel(opaque(value.shape)), [x], [value.shape])
    swap = tuple({dim: value.rank - 1, value.rank - 1: dim}.get(i, i) for i in range(value.rank))
    swapped = tuple(value.shape[i] for i in swap)
    x = _move(lowering, layout.Permute, x, value.shape, swap, value.dtype)
    x = lowering.call(kernel(opaque(swapped)), [x], [swapped])
    return _move(lowering, layout.Permute, x, swapped, swap, value.dtype)


def _reduction(op: str):
    def rule(lowering: Lowering, node: fx.Node) -> relax.Expr:
        x, value = node.args[0], node.meta["value"]
        source = x.meta["value"]
        dims = tuple(sorted(d % source.rank for d in node.kwargs["dims"]))
        kernel = Reduce(op, opaque(source.shape), dims, node.kwargs.get("keepdim", False), value.dtype)
        return lowering.call(kernel, [_cast(lowering, x, value.dtype)], [value.shape])

    return rule


for _name, _op in {"sum": "sum", "mean": "mean", "amax": "max", "amin": "min"}.items():
    register_lowering(_name)(_reduction(_op))


@register_lowering("cumsum")
def _cumsum(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, value = node.args[0], node.meta["value"]
    kernel = CumSum(opaque(value.shape), node.kwargs["dim"] % value.rank, value.dtype)
    return lowering.call(kernel, [_cast(lowering, x, value.dtype)], [value.shape])


@register_lowering("argmax")
def _argmax(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x = node.args[0]
    source = x.meta["value"]
    kernel = ArgMax(
        opaque(source.shape),
        node.kwargs["dim"] % source.rank,
        node.kwargs.get("keepdim", False),
        source.dtype,
    )
    return lowering.call(kernel, [lowering.value(x)], [node.meta["value"].shape])


@register_lowering("argsort")
def _argsort(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x = node.args[0].meta["value"]
    kernel = ArgSort(opaque(x.shape), node.kwargs["dim"] % x.rank, _attribute(node, "descending"), x.dtype)
    return lowering.call(kernel, [lowering.value(node.args[0])], [x.shape])


@register_lowering("scatter")
def _scatter(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, index, _ = (a.meta["value"] for a in node.args)
    kernel = Scatter(
        opaque(x.shape), opaque(index.shape), node.kwargs["dim"] % x.rank, _attribute(node, "reduce"), x.dtype
    )
    return lowering.call(kernel, [lowering.value(a) for a in node.args], [x.shape])


def _cast(lowering: Lowering, x: fx.Node, dtype: str) -> relax.Expr:
    """The value of a node in another dtype."""
    source = x.meta["value"]
    if source.dtype == dtype:
        return lowering.value(x)
    chain = Chain((ChainInput("full", source.dtype),), (Step("cast", (0,), dtype),), (1,))
    shape = opaque(source.shape)
    return lowering.call(Elementwise(chain, (shape,), shape), [lowering.value(x)], [source.shape])


# -- layout


@register_lowering("reshape")
def _reshape(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return lowering.reshape(lowering.value(node.args[0]), node.meta["value"].shape)


def _move(
    lowering: Lowering, kernel, x: relax.Expr, shape: Shape, dims: tuple[int, ...], dtype: str
) -> relax.Expr:
    return lowering.call(kernel(opaque(shape), dims, dtype), [x], [tuple(shape[d] for d in dims)])


@register_lowering("permute")
def _permute(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, value = node.args[0], node.meta["value"]
    rank = value.rank
    dims = tuple(d % rank for d in node.kwargs["dims"])
    moved = [d for d in dims if x.meta["value"].shape[d] != 1]
    if moved == sorted(moved):  # only dimensions of size 1 change places
        return lowering.reshape(lowering.value(x), value.shape)
    return _move(lowering, layout.Permute, lowering.value(x), x.meta["value"].shape, dims, value.dtype)


@register_lowering("expand")
def _expand(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, value = node.args[0], node.meta["value"]
    kernel = copy_kernel(opaque(x.meta["value"].shape), value.dtype, opaque(value.shape))
    return lowering.call(kernel, [lowering.value(x)], [value.shape])


@register_lowering("slice")
def _slice(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, value = node.args[0].meta["value"], node.meta["value"]
    dim, start = node.kwargs["dim"] % x.rank, node.kwargs.get("start", 0)
    source, result = opaque(x.shape), opaque(value.shape)
    # the kernel computes the start from sizes that it sees as extents
    unseen = start.symbols - {str(d) for d in (*source, *result)} if isinstance(start, Dim) else ()
    witnesses = list(dict.fromkeys(lowering.witness(symbol) for symbol in sorted(unseen)))
    specs = tuple(TensorSpec(opaque(w.meta["value"].shape), w.meta["value"].dtype) for w in witnesses)
    kernel = layout.Slice(source, dim, start, result[dim], node.kwargs.get("step", 1), x.dtype, specs)
    return lowering.call(kernel, [lowering.value(n) for n in (node.args[0], *witnesses)], [value.shape])


@register_lowering("concat")
def _concat(lowering: Lowering, node: fx.Node) -> relax.Expr:
    parts, value = node.args[0], node.meta["value"]
    dim = node.kwargs["dim"] % value.rank
    sizes = tuple(opaque(p.meta["value"].shape)[dim] for p in parts)
    kernel = layout.Concat(opaque(value.shape), dim, sizes, value.dtype)
    return lowering.call(kernel, [lowering.value(p) for p in parts], [value.shape])


@register_lowering("pad")
def _pad(lowering: Lowering, node: fx.Node) -> relax.Expr:
    x, value = node.args[0], node.meta["value"]
    flat = node.kwargs["pads"]
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)][::-1]
    pads = ((0, 0),) * (value.rank - len(pairs)) + tuple(pairs)
    kernel = layout.Pad(opaque(x.meta["value"].shape), pads, node.kwargs.get("value", 0.0), value.dtype)
    return lowering.call(kernel, [lowering.value(x)], [value.shape])


@register_lowering("index_select")
def _index_select(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _selection(lowering, node, layout.IndexSelect, *node.args, node.kwargs["dim"])


@register_lowering("gather")
def _gather(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _selection(lowering, node, layout.Gather, *node.args, node.kwargs["dim"])


def _selection(lowering: Lowering, node: fx.Node, kernel, x: fx.Node, index: fx.Node, dim: int) -> relax.Expr:
    source, positions = x.meta["value"], index.meta["value"]
    made = kernel(opaque(source.shape), opaque(positions.shape), dim % source.rank, source.dtype)
    return lowering.call(made, [lowering.value(x), lowering.value(index)], [node.meta["value"].shape])


@register_lowering("cache_update")
def _cache_update(lowering: Lowering, node: fx.Node) -> relax.Expr:
    state, value, position = node.args
    shape, dim = node.meta["value"].shape, node.kwargs["dim"] % node.meta["value"].rank
    length = opaque(value.meta["value"].shape)[dim]
    in_place = lowering.memory.may_overwrite(node)
    kernel = CacheUpdate(
        opaque(shape), dim, length, node.meta["value"].dtype, position.meta["value"].rank == 1, in_place
    )
    args = [lowering.value(value), lowering.value(position)]
    if in_place:
        return lowering.call(kernel, args, [shape], into=lowering.value(state))
    return lowering.call(kernel, [*args, lowering.value(state)], [shape])


@register_lowering("arange")
def _arange(lowering: Lowering, node: fx.Node) -> relax.Expr:
    value: Value = node.meta["value"]
    return lowering.call(layout.Arange(opaque(value.shape)[0], value.dtype), [], [value.shape])


@register_lowering("full")
def _full(lowering: Lowering, node: fx.Node) -> relax.Expr:
    value, number = node.meta["value"], node.kwargs["value"]
    if isinstance(number, Dim):
        return _size(lowering, number, value)
    return lowering.call(layout.Fill(opaque(value.shape), number, value.dtype), [], [value.shape])


def _size(lowering: Lowering, number: Dim, value: Value) -> relax.Expr:
    """A tensor filled with a size: kernels see sizes as extents only, so it is the last of that many, and one more."""
    (count,) = opaque((number,))
    counted = lowering.call(layout.Arange(count), [], [(number,)])
    last = lowering.call(layout.Slice((count,), 0, count - 1, 1, 1, "int64"), [counted], [(1,)])
    steps = (Step("add", (0, Const(1))), Step("cast", (1,), value.dtype))
    chain = Chain((ChainInput("scalar", "int64"),), steps, (2,))
    shape = value.shape or (1,)
    filled = lowering.call(Elementwise(chain, ((1,),), opaque(shape)), [last], [shape])
    return lowering.reshape(filled, value.shape)
