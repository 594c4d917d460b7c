"""Chains of reshape and permute in one normal form, pushed down past the operations that do not mind them.

A chain is described by a `Layout`: the source's axes cut into atoms, and the atoms that make up each axis of the
result. Two chains that move elements alike have equal layouts, so splitting heads and merging them again cancels,
whatever the model wrote: views, transposes, flattened tokens, a time axis first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tersor.ir.dims import Dim, Shape, product
from tersor.ir.matching import Match, P, Rule, is_call
from tersor.ir.program import Builder

MOVES = ("reshape", "permute")

# Element-wise operations on one value (their other operand, if any, is a number).
POINTWISE = (
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log",
    "floor", "round", "cos", "sin", "tanh", "erf", "sigmoid", "silu", "relu", "gelu", "gelu_tanh", "gelu_sigmoid",
    "cast", "eq", "ne", "lt", "le", "gt", "ge", "logical_not",
)  # fmt: skip
# Operations on the last axis only: leading axes may be arranged in any way.
ROWWISE = ("linear", "layer_norm", "rms_norm")


@dataclass(frozen=True)
class Layout:
    """Where the elements of a value lie in another.

    Attributes:
        sizes: size of each atom; atoms of size 1 do not exist.
        source: the atoms of each source axis, outermost first.
        result: the atoms of each result axis.
    """

    sizes: tuple[int | Dim, ...]
    source: tuple[tuple[int, ...], ...]
    result: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(shape: Shape) -> Layout:
        sizes = tuple(d for d in shape if d != 1)
        atoms = iter(range(len(sizes)))
        axes = tuple(() if d == 1 else (next(atoms),) for d in shape)
        return Layout(sizes, axes, axes)

    def shape(self, axes: tuple[tuple[int, ...], ...]) -> Shape:
        return tuple(product(self.sizes[a] for a in axis) for axis in axes)

    def permute(self, dims: Sequence[int]) -> Layout:
        return Layout(self.sizes, self.source, tuple(self.result[d] for d in dims))

    def reshape(self, shape: Shape) -> Layout | None:
        """The layout after one more reshape; None when its axes cut across atoms."""
        sizes, halves = list(self.sizes), {}
        queue = deque(a for axis in self.result for a in axis)
        result: list[tuple[int, ...]] = []
        for size in shape:
            group: list[int] = []
            rest = size
            while rest != 1:
                if not queue:
                    return None
                atom = queue.popleft()
                if (quotient := _divide(rest, sizes[atom])) is not None:
                    group.append(atom)
                    rest = quotient
                elif (quotient := _divide(sizes[atom], rest)) is not None:
                    outer, inner = len(sizes), len(sizes) + 1
                    sizes += [rest, quotient]
                    halves[atom] = (outer, inner)
                    group.append(outer)
                    queue.appendleft(inner)
                    rest = 1
                else:
                    return None
            result.append(tuple(group))
        if queue:
            return None

        def whole(atom: int) -> tuple[int, ...]:
            return tuple(a for half in halves[atom] for a in whole(half)) if atom in halves else (atom,)

        source = tuple(tuple(a for atom in axis for a in whole(atom)) for axis in self.source)
        return Layout(tuple(sizes), source, tuple(result))

    def resized(self, atom: int, size: int | Dim) -> Layout:
        """The same layout of a source in which one atom has another size."""
        if size == 1:
            source, result = (
                tuple(tuple(a for a in axis if a != atom) for axis in axes)
                for axes in (self.source, self.result)
            )
            return Layout(self.sizes, source, result)
        return Layout((*self.sizes[:atom], size, *self.sizes[atom + 1 :]), self.source, self.result)

    def stages(self) -> tuple[Shape | None, tuple[int, ...] | None, Shape | None]:
        """The shortest form: reshape to, permute by, reshape to; None for a stage that is not needed."""
        source_shape, result_shape = self.shape(self.source), self.shape(self.result)
        order = [a for axis in self.source for a in axis]
        target = [a for axis in self.result for a in axis]
        if order == target:
            return None, None, None if source_shape == result_shape else result_shape
        if (dims := self._whole_axes()) is not None:
            return None, dims, None
        home = {a: i for i, axis in enumerate(self.source) for a in axis}
        destination = {a: i for i, axis in enumerate(self.result) for a in axis}
        follows = dict(zip(target, target[1:], strict=False))
        blocks: list[list[int]] = []
        for atom in order:
            last = blocks[-1][-1] if blocks else None
            together = last is not None and (
                home[last] == home[atom] or destination[last] == destination[atom]
            )
            if together and follows.get(last) == atom:
                blocks[-1].append(atom)
            else:
                blocks.append([atom])
        split = tuple(product(self.sizes[a] for a in block) for block in blocks)
        starts = {block[0]: i for i, block in enumerate(blocks)}
        dims = tuple(starts[a] for a in target if a in starts)
        moved = tuple(split[d] for d in dims)
        return None if split == source_shape else split, dims, None if moved == result_shape else result_shape

    def _whole_axes(self) -> tuple[int, ...] | None:
        """The permutation, where whole axes change places and nothing is cut."""
        left, dims = list(range(len(self.source))), []
        for axis in self.result:
            found = next((i for i in left if self.source[i] == axis), None)
            if found is None:
                return None
            dims.append(found)
            left.remove(found)
        return None if left else tuple(dims)


def _divide(size: int | Dim, by: int | Dim) -> int | Dim | None:
    """size / by where that is exact for all sizes."""
    if isinstance(size, Dim):
        return size // by if size.divisible(by) else None
    return size // by if isinstance(by, int) and by and size % by == 0 else None


def trace(node: fx.Node) -> tuple[fx.Node, Layout]:
    """Follows reshapes and permutes up from ``node``: the source and how it lies in the node."""
    chain = [node]
    while is_call(chain[-1], *MOVES):
        chain.append(chain[-1].args[0])
    while True:
        layout: Layout | None = Layout.of(chain[-1].meta["value"].shape)
        for move in reversed(chain[:-1]):
            layout = follow(layout, move)
            if layout is None:
                break
        if layout is not None:
            return chain[-1], layout
        chain.pop()


def follow(layout: Layout, move: fx.Node) -> Layout | None:
    """The layout after the move that a reshape or permute node makes."""
    if move.target.name == "permute":
        return layout.permute(move.kwargs["dims"])
    return layout.reshape(move.kwargs["shape"])


def arrange(build: Builder, source: fx.Node, layout: Layout) -> fx.Node:
    """Emits a layout in its shortest form."""
    first, dims, last = layout.stages()
    if first is not None:
        source = build.reshape(source, shape=first)
    if dims is not None:
        source = build.permute(source, dims=dims)
    return source if last is None else build.reshape(source, shape=last)


# -- rules


def _length(node: fx.Node, source: fx.Node) -> int:
    count = 0
    while node is not source:
        node, count = node.args[0], count + 1
    return count


def _not_shortest(m: Match) -> str | None:
    source, layout = trace(m.root)
    stages = layout.stages()
    needed = sum(stage is not None for stage in stages)
    have = _length(m.root, source)
    if needed < have:
        return None
    if have == needed == 1 and (stages[1] is None) != (m.root.target.name == "reshape"):
        return None  # a permute of axes of size 1 is a reshape
    return "already in shortest form"


def _shortest(build: Builder, m: Match) -> fx.Node:
    return arrange(build, *trace(m.root))


def _moved_operand(node: fx.Node) -> fx.Node | None:
    """The reshaped or permuted value that an operation works on; the only one if it is point-wise."""
    if node.target.name in ROWWISE:
        return node.args[0] if is_call(node.args[0], *MOVES) else None
    values = node.all_input_nodes
    return values[0] if len(values) == 1 and is_call(values[0], *MOVES) else None


def _sinks(m: Match) -> str | None:
    moved = _moved_operand(m.root)
    if moved is None:
        return "not on one reshaped or permuted value"
    source, layout = trace(moved)
    last = source.meta["value"].shape[-1:]
    if m.root.target.name in ROWWISE and (not last or layout.source[-1:] != layout.result[-1:]):
        return "the last axis does not stay as it is"
    return None


def _sink(build: Builder, m: Match) -> fx.Node:
    """The operation on the source, and the whole chain after it."""
    moved = _moved_operand(m.root)
    source, layout = trace(moved)
    result = build.emit(m.root.target, *(source if a is moved else a for a in m.root.args), **m.root.kwargs)
    if m.root.target.name in ROWWISE:
        layout = _wider(layout, result.meta["value"].shape[-1])
    return arrange(build, result, layout)


def _same_move(m: Match) -> str | None:
    return None if trace(m["x"])[1] == trace(m["y"])[1] else "the operands are arranged differently"


def _sink_both(build: Builder, m: Match) -> fx.Node:
    (x, layout), (y, _) = trace(m["x"]), trace(m["y"])
    return arrange(build, build.emit(m.root.target, x, y), layout)


def _last_axis_stays(m: Match) -> str | None:
    if m.value("vector").shape != m.value("x").shape[-1:]:
        return f"{m.value('vector')} is not one number per channel"
    _, layout = trace(m["x"])
    same = layout.source and layout.result and layout.source[-1] == layout.result[-1]
    return None if same else "the last axis does not stay as it is"


def _sink_vector(build: Builder, m: Match) -> fx.Node:
    source, layout = trace(m["x"])
    return arrange(build, build.emit(m.root.target, source, m["vector"]), layout)


def _joined(m: Match) -> tuple[fx.Node, fx.Node, Layout] | None:
    """The operand whose leading axes a reshape has joined or cut, the one that broadcasts, and the reshape's layout."""
    shape = m.root.meta["value"].shape
    for x, y in (m.root.args, m.root.args[::-1]):
        if not (isinstance(x, fx.Node) and isinstance(y, fx.Node) and is_call(x, "reshape")):
            continue
        _, layout = trace(x)
        same_order = layout.stages()[1] is None and layout.source[-1:] == layout.result[-1:]
        if same_order and x.meta["value"].shape == shape != y.meta["value"].shape:
            return x, y, layout
    return None


def _under(y: Shape, layout: Layout) -> Shape | None:
    """The shape in which what broadcasts to the layout's result broadcasts to its source; None if there is none."""
    y = (1,) * (len(layout.result) - len(y)) + y
    full = {atom for size, axis in zip(y, layout.result, strict=True) if size != 1 for atom in axis}
    shape = []
    for axis in layout.source:
        if not full.isdisjoint(axis) and not full.issuperset(axis):
            return None
        shape.append(product(layout.sizes[a] for a in axis if a in full))
    return tuple(shape)


def _sinks_under(m: Match) -> str | None:
    found = _joined(m)
    if found is None:
        return "no operand broadcasts over reshaped leading axes"
    _, y, layout = found
    if _under(y.meta["value"].shape, layout) is None:
        return "the other operand differs along a part of an axis"
    return None


def _sink_under(build: Builder, m: Match) -> fx.Node:
    x, y, layout = _joined(m)
    source, other = trace(x)[0], build.reshape(y, shape=_under(y.meta["value"].shape, layout))
    operands = [source if a is x else other for a in m.root.args]
    return arrange(build, build.emit(m.root.target, *operands), layout)


def _bare(m: Match) -> fx.Node | None:
    """The operand that is a value without its leading axes of size 1, where the result has them anyway."""
    rank = m.root.meta["value"].rank
    for x in m.root.args:
        if isinstance(x, fx.Node) and is_call(x, "reshape"):
            shape, whole = x.meta["value"].shape, x.args[0].meta["value"].shape
            if len(shape) < len(whole) <= rank and whole == (1,) * (len(whole) - len(shape)) + shape:
                return x
    return None


def _dress(build: Builder, m: Match) -> fx.Node:
    bare = _bare(m)
    return build.emit(m.root.target, *(x.args[0] if x is bare else x for x in m.root.args))


def _joined_batch(m: Match) -> Shape | None:
    """The axes that were joined into the batch of both operands of a product of matrices."""
    found = []
    for name in ("x", "y"):
        if m.value(name).rank != 3:
            return None
        _, layout = trace(m[name])
        found.append(tuple(layout.sizes[a] for a in layout.result[0]))
    return found[0] if found[0] == found[1] and len(found[0]) > 1 else None


def _part_batch(build: Builder, m: Match) -> fx.Node:
    lead = _joined_batch(m)
    x, y = (build.reshape(m[name], shape=(*lead, *m.value(name).shape[1:])) for name in ("x", "y"))
    return build.reshape(build.matmul(x, y), shape=m.root.meta["value"].shape)


def _sum_of_parts(m: Match) -> str | None:
    if m.value("x").shape != m.value("y").shape:
        return "an operand broadcasts"
    if _same_move(m) is None:
        return "the operands are arranged alike"
    return None if _joined_batch(m) else "the operands' batches are not joined from the same axes"


def _part_sum(build: Builder, m: Match) -> fx.Node:
    lead = _joined_batch(m)
    x, y = (build.reshape(a, shape=(*lead, *a.meta["value"].shape[1:])) for a in m.root.args)
    return build.reshape(build.emit(m.root.target, x, y), shape=m.root.meta["value"].shape)


def _gathered_parts(m: Match) -> Shape | None:
    """The axes that were joined into the first one of what a gather takes from, along another axis."""
    x = m.value("x")
    if m.root.kwargs["dim"] % x.rank == 0 or m.value("index").shape[0] != x.shape[0]:
        return None
    _, layout = trace(m["x"])
    lead = tuple(layout.sizes[a] for a in layout.result[0])
    return lead if len(lead) > 1 else None


def _part_gather(build: Builder, m: Match) -> fx.Node:
    lead, dim = _gathered_parts(m), m.root.kwargs["dim"] % m.value("x").rank
    x, index = (build.reshape(m[n], shape=(*lead, *m.value(n).shape[1:])) for n in ("x", "index"))
    return build.reshape(build.gather(x, index, dim=dim + len(lead) - 1), shape=m.root.meta["value"].shape)


def _expanded(m: Match) -> tuple[fx.Node, Layout] | None:
    """What is expanded, with as many axes as the result of that, and how it lies in the moved value."""
    wide, layout = trace(m.root)
    if not is_call(wide, "expand"):
        return None
    narrow, after = wide.args[0].meta["value"].shape, wide.meta["value"].shape
    narrow = (1,) * (len(after) - len(narrow)) + narrow
    new = {a for d, w, axis in zip(narrow, after, layout.source, strict=True) if d != w for a in axis}
    if not new or any(not new.isdisjoint(axis) and not new.issuperset(axis) for axis in layout.result):
        return None
    for atom in new:
        layout = layout.resized(atom, 1)
    return wide.args[0], layout


def _expand_last(build: Builder, m: Match) -> fx.Node:
    narrow, layout = _expanded(m)
    moved = arrange(build, build.reshape(narrow, shape=layout.shape(layout.source)), layout)
    return build.expand(moved, shape=m.root.meta["value"].shape)


def _wider(layout: Layout, width: int | Dim) -> Layout:
    """The layout when the last axis, which stays whole, gets another size."""
    atoms = layout.source[-1]
    if not atoms:  # a width of 1 had no atom
        if width == 1:
            return layout
        new = len(layout.sizes)
        return Layout((*layout.sizes, width), (*layout.source[:-1], (new,)), (*layout.result[:-1], (new,)))
    if len(atoms) > 1:
        merged = Layout(layout.sizes, (*layout.source[:-1], atoms[:1]), (*layout.result[:-1], atoms[:1]))
        return merged.resized(atoms[0], width)
    return layout.resized(atoms[0], width)


def _outer_atom(m: Match) -> tuple[fx.Node, Layout, int, int] | None:
    """Source, layout, source axis and atom, where the sliced axis is the outer part of a source axis."""
    source, layout = trace(m["moved"])
    group = layout.result[m.root.kwargs["dim"] % len(layout.result)]
    if len(group) != 1:
        return None
    axis = next(i for i, atoms in enumerate(layout.source) if group[0] in atoms)
    return (source, layout, axis, group[0]) if layout.source[axis][0] == group[0] else None


def _slice_lifts(m: Match) -> str | None:
    if m.root.kwargs.get("step", 1) != 1:
        return "the slice has a step"
    return None if _outer_atom(m) else "the sliced axis is not the outer part of an axis of the source"


def _lift_slice(build: Builder, m: Match) -> fx.Node:
    source, layout, axis, atom = _outer_atom(m)
    inner = product(layout.sizes[a] for a in layout.source[axis][1:])
    start, size = m.root.kwargs.get("start", 0), m.root.meta["value"].shape[m.root.kwargs["dim"]]
    taken = build.slice(source, dim=axis, start=start * inner, end=(start + size) * inner)
    return arrange(build, taken, layout.resized(atom, size))


def _inserted(m: Match) -> str | None:
    """A reshape that inserts or removes axes of size 1 and does nothing else."""
    before, after = m.value("x").shape, m["moved"].kwargs["shape"]
    same = [d for d in before if d != 1] == [d for d in after if d != 1]
    if not same:
        return "the reshape cuts or joins axes"
    return None if _reduced_axes(m) else "only axes of size 1 are reduced"


def _reduced_axes(m: Match) -> tuple[int, ...]:
    """The reduced axes, in the shape before the reshape."""
    before, after = m.value("x").shape, m["moved"].kwargs["shape"]
    origin = iter([i for i, d in enumerate(before) if d != 1])
    homes = [None if d == 1 else next(origin) for d in after]
    reduced = {d % len(after) for d in m.root.kwargs["dims"]}
    return tuple(sorted(homes[d] for d in reduced if homes[d] is not None))


def _reduce_first(build: Builder, m: Match) -> fx.Node:
    made = build.emit(m.root.target, m["x"], dims=_reduced_axes(m), keepdim=True)
    return build.reshape(made, shape=m.root.meta["value"].shape)


_MOVED = P.op(MOVES, P.any()).named("moved")

RULES = (
    # reshape(reshape(x))  ->  reshape(x), also where the shapes have no common factors
    Rule(
        "layout.reshape_of_reshape",
        P.reshape(P.reshape(P.any("x"))),
        lambda build, m: build.reshape(m["x"], shape=m.root.kwargs["shape"]),
    ),
    # permute(permute(reshape(x)))  ->  reshape(x), permute(x), or nothing
    Rule("layout.shortest", P.op(MOVES, P.any()), _shortest, _not_shortest),
    # gelu(reshape(x))  ->  reshape(gelu(x));  linear(permute(x, 1 0 2), w)  ->  permute(linear(x, w), 1 0 2)
    Rule("layout.sink", P.op((*POINTWISE, *ROWWISE), ...), _sink, _sinks),
    # permute(x) + permute(y)  ->  permute(x + y)
    Rule(
        "layout.sink_both",
        P.op(("add", "sub", "mul", "div"), P.op(MOVES, P.any()).named("x"), P.op(MOVES, P.any()).named("y")),
        _sink_both,
        _same_move,
    ),
    # reshape(x) + bias  ->  reshape(x + bias)
    Rule(
        "layout.sink_vector",
        P.op(("add", "mul"), P.op(MOVES, P.any()).named("x"), P.parameter("vector")),
        _sink_vector,
        _last_axis_stays,
    ),
    # reshape(x, [B*H, T]) + y [B*H, 1]  ->  reshape(x + reshape(y, [B, H, 1]), [B*H, T])
    Rule(
        "layout.sink_broadcast",
        P.op(("add", "sub", "mul", "div"), P.any(), P.any()),
        _sink_under,
        _sinks_under,
    ),
    # reshape(x [1, T, D], [T, D]) * y [1, T, D]  ->  x * y
    Rule(
        "layout.leading_ones",
        P.op(("add", "sub", "mul", "div"), P.any(), P.any()),
        _dress,
        lambda m: None if _bare(m) else "no operand lacks axes of size 1 that the result has",
    ),
    # matmul(reshape(x, [B*H, T, D]), reshape(y, [B*H, D, S]))  ->  reshape(matmul(x, y), [B*H, T, S])
    Rule(
        "layout.batch_of_product",
        P.matmul(P.op(MOVES, P.any()).named("x"), P.op(MOVES, P.any()).named("y")),
        _part_batch,
        lambda m: None if _joined_batch(m) else "the operands' batches are not joined from the same axes",
    ),
    # reshape(x, [B*H, T, S]) + permute(reshape(y, [B*H, S, T]))  ->  reshape(x + permute(y), [B*H, T, S])
    Rule(
        "layout.batch_of_sum",
        P.op(("add", "sub", "mul", "div"), P.op(MOVES, P.any()).named("x"), P.op(MOVES, P.any()).named("y")),
        _part_sum,
        _sum_of_parts,
    ),
    # gather(reshape(x, [B*H, T, S]), index, dim=2)  ->  reshape(gather(x, reshape(index, [B, H, T, U]), dim=3))
    Rule(
        "layout.batch_of_gather",
        P.gather(P.op(MOVES, P.any()).named("x"), P.any("index")),
        _part_gather,
        lambda m: None if _gathered_parts(m) else "the first axis is not joined from others",
    ),
    # reshape(permute(expand(x)))  ->  expand(reshape(permute(x))), where the new axes stay by themselves
    Rule(
        "layout.expand_last",
        P.op(MOVES, P.any()),
        _expand_last,
        lambda m: None if _expanded(m) else "no expanded axis stays by itself",
    ),
    # mean(reshape(x, [B, C, 1, T]), 2 3)  ->  reshape(mean(x, 2))
    Rule(
        "layout.reduce_first",
        P.op(("mean", "sum", "amax", "amin"), P.reshape(P.any("x")).named("moved")),
        _reduce_first,
        _inserted,
    ),
    # slice(permute(reshape(x)))  ->  permute(reshape(slice(x)))
    Rule("layout.lift_slice", P.slice(_MOVED), _lift_slice, _slice_lifts),
)
