"""How each operation becomes kernel calls."""

from __future__ import annotations

from torch import fx
from tvm import relax

from tersor.codegen import tiles
from tersor.codegen.fusion import Joined
from tersor.codegen.kernels import layout
from tersor.codegen.kernels.attention import Attention
from tersor.codegen.kernels.batched_gemm import BatchedGemm
from tersor.codegen.kernels.cache import CacheUpdate
from tersor.codegen.kernels.chain import Chain, ChainInput, Step
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.codegen.kernels.embedding import Embedding
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.norm import LayerNorm, Reduce, RMSNorm
from tersor.codegen.kernels.scan import ArgMax, CumSum
from tersor.codegen.kernels.softmax import Softmax
from tersor.codegen.lowering import Lowering, copy_kernel, opaque, register_lowering
from tersor.codegen.weights import Weight
from tersor.errors import CompileError
from tersor.ir.dims import Dim, Shape, product
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
    x, weight, bias = (*node.args, None, None)[:3]
    shape = node.meta["value"].shape
    norm = kernel(opaque(shape[:-1]), shape[-1], node.kwargs.get("eps", node.target.attributes["eps"]),
                  weight is not None, bias is not None)  # fmt: skip
    return lowering.call(norm, [lowering.value(a) for a in (x, weight, bias) if a is not None], [shape])


@register_lowering("embedding")
def _embedding(lowering: Lowering, node: fx.Node) -> relax.Expr:
    ids, table = node.args
    count, size = table.meta["value"].shape
    panel = 0
    if table.op == "get_attr":
        # a tied output projection has packed the table already: read that copy
        tied = any(linear.args[1].target == table.target for linear in lowering.function.calls("linear"))
        panel = tiles.panel_width(lowering.target) if tied else 0
        stored = lowering.weight(Weight((table.target,), panel or None))
    else:
        stored = lowering.value(table)
    kernel = Embedding(opaque(ids.meta["value"].shape), count, size, panel)
    return lowering.call(kernel, [lowering.value(ids), stored], [node.meta["value"].shape])


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


@register_lowering("attention")
def _attention(lowering: Lowering, node: fx.Node) -> relax.Expr:
    q, k, v, mask = (*node.args, None)[:4]
    (batch, q_len, width), kv_len = opaque(q.meta["value"].shape), opaque(k.meta["value"].shape)[1]
    heads, kv_heads = node.kwargs["heads"], node.kwargs["kv_heads"]
    joined = lowering.plan.joined.get(node)
    kernel = Attention(
        batch,
        q_len,
        kv_len,
        heads,
        kv_heads,
        width // heads,
        v.meta["value"].shape[-1] // kv_heads,
        node.kwargs["scale"],
        causal=node.kwargs.get("causal", False),
        window=node.kwargs.get("window"),
        mask=None if mask is None else opaque(mask.meta["value"].shape),
        mask_dtype="bool" if mask is None else mask.meta["value"].dtype,
        packed="qkv" if joined else "",
        softcap=node.kwargs.get("softcap"),
    )
    args = [_joined(lowering, joined)] if joined else [lowering.value(a) for a in (q, k, v)]
    args += [lowering.value(mask)] if mask is not None else []
    return lowering.call(kernel, args, [node.meta["value"].shape])


def _joined(lowering: Lowering, joined: Joined) -> relax.Expr:
    """Linear layers of one input as one, their outputs side by side."""
    x, sizes = joined.anchors[0].args[0], [a.meta["value"].shape[-1] for a in joined.anchors]
    value, n, panel = x.meta["value"], sum(sizes), tiles.panel_width(lowering.target)
    weight = Weight(tuple(a.args[1].target for a in joined.anchors), panel)
    gemm = Gemm(opaque(value.shape[:-1]), value.shape[-1], n, joined.chain, panel, dtype=value.dtype)
    args = [lowering.value(x), lowering.weight(weight)]
    for kind, operands, spec in zip(
        (i.kind for i in joined.chain.inputs[1:]), joined.feeds, gemm.inputs()[2:], strict=True
    ):
        if kind == "column":
            parts = zip(sizes, operands, strict=True)
            args.append(lowering.weight(Weight(tuple(n if o is None else o.target for n, o in parts))))
        else:
            args.append(lowering.view(operands[0], spec.shape))
    return lowering.call(gemm, args, [(*value.shape[:-1], n)])


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
    one = {
        key: (node.kwargs.get(key, node.target.attributes[key]),) for key in ("stride", "padding", "dilation")
    }
    return _convolution(lowering, node, **one)


@register_lowering("conv2d")
def _conv2d(lowering: Lowering, node: fx.Node) -> relax.Expr:
    two = {
        key: tuple(node.kwargs.get(key, node.target.attributes[key]))
        for key in ("stride", "padding", "dilation")
    }
    return _convolution(lowering, node, **two)


def _convolution(lowering: Lowering, node: fx.Node, *, stride, padding, dilation) -> relax.Expr:
    """Windows as rows, times the weight, channels moved to the front."""
    x, weight, bias = (*node.args, None)[:3]
    if weight.op != "get_attr" or node.kwargs.get("groups", 1) != 1:
        raise CompileError(
            "this convolution has no lowering",
            where=describe(node),
            why="only convolutions in one group, with a stored weight, become a GEMM",
            fix="give the layer another form, or a lowering of its own (codegen.register_lowering)",
        )
    (batch, channels, *sizes), shape = x.meta["value"].shape, node.meta["value"].shape
    n, _, *kernel = weight.meta["value"].shape
    windows, k = shape[2:], channels * product(kernel)
    unfold = layout.Unfold(
        *opaque((batch, channels)),
        opaque(tuple(sizes)),
        tuple(kernel),
        opaque(windows),
        stride,
        padding,
        dilation,
    )
    rows = lowering.call(unfold, [lowering.value(x)], [(batch, product(windows), k)])
    packed = Weight((weight.target,), tiles.panel_width(lowering.target))
    out = _projection(
        lowering,
        rows,
        (batch, product(windows)),
        packed,
        n,
        k,
        Weight((bias.target,)) if bias is not None else None,
    )
    out = _move(lowering, layout.Permute, out, (batch, product(windows), n), (0, 2, 1), "float32")
    return lowering.reshape(out, shape)


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
    shapes = (x.shape, value.shape)
    if isinstance(start, Dim):
        # the kernel computes the start from the shapes, so their symbols stay as they are
        kernel = layout.Slice(x.shape, dim, start, value.shape[dim], node.kwargs.get("step", 1), x.dtype)
    else:
        source, result = (opaque(s) for s in shapes)
        kernel = layout.Slice(source, dim, start, result[dim], node.kwargs.get("step", 1), x.dtype)
    return lowering.call(kernel, [lowering.value(node.args[0])], [value.shape])


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
    return _selection(lowering, node, layout.IndexSelect)


@register_lowering("gather")
def _gather(lowering: Lowering, node: fx.Node) -> relax.Expr:
    return _selection(lowering, node, layout.Gather)


def _selection(lowering: Lowering, node: fx.Node, kernel) -> relax.Expr:
    x, index = (a.meta["value"] for a in node.args)
    made = kernel(opaque(x.shape), opaque(index.shape), node.kwargs["dim"] % x.rank, x.dtype)
    return lowering.call(made, [lowering.value(a) for a in node.args], [node.meta["value"].shape])


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
        raise CompileError(
            f"a tensor is filled with the size {number}",
            where=describe(node),
            why="kernels see sizes only as extents of their arguments",
            fix="make the dimension static",
        )
    return lowering.call(layout.Fill(opaque(value.shape), number, value.dtype), [], [value.shape])
