"""Which nodes go into one kernel.

A *group* is one kernel call: a root node whose value is written to memory, the element-wise nodes computed on the
way to it, and the anchors (linear layers of one input, of floats or of codes) whose accumulators the element-wise
work starts from: one, or two for a gated feed-forward layer. Groups are grown from their roots towards the inputs, the
last node first.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

from torch import fx

from tersor.codegen.kernels.chain import Chain, ChainInput, Const, InputKind, Step
from tersor.ir.dims import Shape
from tersor.ir.matching import is_call
from tersor.ir.opset.quantization import SMALLEST_GROUP
from tersor.ir.opset.rules import promote
from tersor.ir.program import Function

COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
LOGICAL = {"logical_and", "logical_or", "logical_not"}

PRODUCTS = ("linear", "integer_linear", "grouped_integer_linear")

ATTENTIONS = ("attention", "integer_attention")

EPILOGUE_DTYPES = {"float32", "float16", "bfloat16", "int8", "uint8"}
"""What a GEMM's epilogue may store."""

BF16 = frozenset({"bfloat16"})
"""What every target has products for that read both operands in 16 bits; some have such of float16 as well."""


@dataclass
class Group:
    """One kernel: ``members`` are the element-wise nodes in order, the root last; ``anchors`` are linear layers."""

    root: fx.Node
    members: list[fx.Node] = field(default_factory=list)
    anchors: list[fx.Node] = field(default_factory=list)


@dataclass
class Plan:
    """The groups by root, and every node that lives inside a group without being its root.

    ``narrow``: dtypes of 16 bits that products read both operands in.
    """

    narrow: Set[str] = BF16
    groups: dict[fx.Node, Group] = field(default_factory=dict)
    inner: set[fx.Node] = field(default_factory=set)
    joined: dict[fx.Node, Joined] = field(default_factory=dict)  # attention -> its q, k and v projections
    tails: dict[fx.Node, Tail] = field(
        default_factory=dict
    )  # norm, attention or `dynamic_scale` -> what its kernel adds

    def left_matrix(self, linear: fx.Node) -> fx.Node:
        """What a linear layer's product reads (`left_matrix`)."""
        return left_matrix(linear, self.narrow)


@dataclass(frozen=True)
class Joined:
    """Projections of one input that are one GEMM, their outputs side by side.

    Attributes:
        anchors: the linear layers.
        members: the element-wise nodes behind them.
        chain: the epilogue of all of them.
        feeds: for each of the chain's inputs behind the accumulator, the operand of each layer (None: absent).
    """

    anchors: tuple[fx.Node, ...]
    members: tuple[fx.Node, ...]
    chain: Chain
    feeds: tuple[tuple[fx.Node | None, ...], ...]


@dataclass(frozen=True)
class Tail:
    """What a norm's or an attention's kernel computes behind its own value, while that is at hand.

    Attributes:
        group: element-wise work that becomes its epilogue; of a scale per token: what is scaled.
        scale: a scale per token of the norm's value (`dynamic_scale`), or several.
        codes: the codes with that scale, equal nodes.
        kept: the norm's or attention's own value is read by others too.
    """

    group: Group | None = None
    scale: fx.Node | None = None
    codes: tuple[fx.Node, ...] = ()
    kept: bool = True

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node that gets its value from the kernel, beside the norm or the scale itself."""
        return [
            *(self.group.members if self.group else ()),
            *([self.scale] if self.scale else ()),
            *self.codes,
        ]


def plan(function: Function, narrow: Set[str] = BF16) -> Plan:
    """Groups the nodes of a function; nodes in no group are lowered one by one. ``narrow``: as in `Plan`."""
    result = Plan(narrow)
    claimed = _widenings(function, narrow) | set(filter(is_widened_rows, function.calls("cast")))
    for node in reversed(function.nodes):
        if node in claimed or not (is_elementwise(node) or is_anchor(node)):
            continue
        group = _grow(node, claimed, narrow)
        claimed.update(group.members, group.anchors)
        result.groups[node] = group
    result.inner = claimed - result.groups.keys()
    _join_projections(function, result)
    _follow_rows(function, result)
    for rows in filter(is_decoded_rows, function.calls("dequantize")):
        result.inner.update(n for n in rows.args[:2] if is_call(n))  # its kernel reads table and scales
    return result


def is_elementwise(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target.elementwise is not None


def is_anchor(node: fx.Node) -> bool:
    """A linear layer whose weight is a stored parameter, so that it can be packed ahead of time.

    Groups that share a scale are of sizes that products of codes have.
    """
    fits = is_call(node, *PRODUCTS) and stored_weight(node).op == "get_attr"
    if not fits or (scales := scales_of(node)) is None:
        return fits
    return node.args[1].meta["value"].shape[1] // scales.meta["value"].shape[-1] % SMALLEST_GROUP == 0


def scales_of(product: fx.Node) -> fx.Node | None:
    """The scales of groups that a product applies to its sums."""
    return product.args[2] if is_call(product, "grouped_integer_linear") else None


def bias_of(product: fx.Node) -> fx.Node | None:
    """What is added to a product's sums."""
    return None if scales_of(product) else (*product.args, None)[2]


def left_matrix(linear: fx.Node, narrow: Set[str] = BF16) -> fx.Node:
    """What a linear layer's product reads: its input, or the ``narrow`` values of which that is the f32 form."""
    return linear.args[0].args[0] if _widened_both(linear) in narrow else linear.args[0]


def stored_weight(linear: fx.Node) -> fx.Node:
    """What holds a linear layer's weight: the operand, or the parameter in 16 bits of which that is the f32 form.

    fp16 weights are read so whatever they are multiplied by, bf16 ones beside bf16 values only.
    """
    weight = linear.args[1]
    stored = _widened_from(weight) == "float16" and weight.args[0].op == "get_attr"
    return weight.args[0] if stored or _widened_both(linear) else weight


def _widened_both(linear: fx.Node) -> str | None:
    """The dtype of 16 bits of which both operands are values, widened to f32: products of such are exact in f32."""
    x, weight = linear.args[:2]
    dtype = _widened_from(weight)
    return dtype if dtype == _widened_from(x) and dtype and weight.args[0].op == "get_attr" else None


def _widened_from(node: fx.Node) -> str | None:
    """The dtype of 16 bits of which a node is the f32 form."""
    if not is_call(node, "cast") or node.meta["value"].dtype != "float32":
        return None
    dtype = node.args[0].meta["value"].dtype
    return dtype if dtype in ("bfloat16", "float16") else None


def _widenings(function: Function, narrow: Set[str]) -> set[fx.Node]:
    """Casts from 16 bits that only products read which take the narrow values themselves."""

    def is_passed_by(linear: fx.Node, cast: fx.Node) -> bool:
        if not is_call(linear, "linear") or linear.args[2:3] == (cast,):
            return False
        read = {linear.args[0]: left_matrix(linear, narrow), linear.args[1]: stored_weight(linear)}
        return read[cast] is cast.args[0]

    return {
        node
        for node in filter(_widened_from, function.calls("cast"))
        if node.users and all(is_passed_by(user, node) for user in node.users)
    }


def _grow(root: fx.Node, claimed: set[fx.Node], narrow: Set[str]) -> Group:
    group = Group(root)
    if is_anchor(root):
        group.anchors = [root]
        return group
    inside, shape = {root}, root.meta["value"].shape
    frontier = list(root.all_input_nodes)
    while frontier:
        node = frontier.pop()
        if node in inside or node in group.anchors or node in claimed or node.meta["value"].shape != shape:
            continue
        if not all(user in inside for user in node.users):
            continue
        if is_elementwise(node):
            inside.add(node)
            frontier.extend(node.all_input_nodes)
        elif (
            is_anchor(node)
            and _joins(node, group.anchors, narrow)
            and root.meta["value"].dtype in EPILOGUE_DTYPES
        ):
            group.anchors.append(node)
    group.members = [n for n in root.graph.nodes if n in inside]
    group.anchors.sort(key=list(root.graph.nodes).index)
    if group.anchors and not _fits_epilogue(group):
        group.anchors = []  # the linears get kernels of their own
    return group


def _joins(node: fx.Node, anchors: list[fx.Node], narrow: Set[str]) -> bool:
    """Whether a linear can be computed beside those in a group: at most two, of one input and one size."""
    return not anchors or (
        len(anchors) == 1
        and anchors[0].target is node.target
        and left_matrix(anchors[0], narrow) is left_matrix(node, narrow)
        and scales_of(anchors[0]) is scales_of(node)
        and stored_weight(anchors[0]).meta["value"] == stored_weight(node).meta["value"]
    )


def _join_projections(function: Function, result: Plan) -> None:
    """Query, key and value projections of one input become one GEMM: more panels to share out, one launch."""
    for node in function.calls(*ATTENTIONS):
        roots = node.args[:3]
        groups = [result.groups.get(root) for root in roots]
        if len({*roots}) < 3 or any(
            g is None or len(g.anchors) != 1 or len(g.root.users) > 1 for g in groups
        ):
            continue
        anchors = tuple(g.anchors[0] for g in groups)
        read = {
            (a.target, left_matrix(a, result.narrow), scales_of(a), stored_weight(a).meta["value"].dtype)
            for a in anchors
        }
        if len(read) > 1:
            continue
        if joined := _joined(anchors, groups):
            result.joined[node] = joined
            for root in roots:
                del result.groups[root]
            result.inner.update(roots)


def narrowed(joined: Joined) -> Joined:
    """The same projections with their results rounded to bf16."""
    chain = joined.chain
    steps = (*chain.steps, Step("cast", chain.outputs, "bfloat16"))
    return replace(joined, chain=Chain(chain.inputs, steps, (len(chain.inputs) + len(steps) - 1,)))


def _biased(chain: Chain) -> Chain:
    """The chain with a bias added to its f32 result."""
    inputs = len(chain.inputs)

    def moved(arg: int | Const) -> int | Const:
        return arg if isinstance(arg, Const) or arg < inputs else arg + 1

    steps = [Step(s.op, tuple(map(moved, s.args)), s.dtype) for s in chain.steps]
    steps.append(Step("add", (moved(chain.outputs[0]), inputs)))
    return Chain((*chain.inputs, ChainInput("column")), tuple(steps), (inputs + len(steps),))


def _is_stored_vector(operand: fx.Node | None) -> bool:
    """One number per column in a parameter; an absent operand is as good as zeros."""
    return operand is None or operand.op == "get_attr" and operand.meta["value"].rank == 1


def is_token_codes(node: fx.Node) -> bool:
    """uint8 codes of a value with a symmetric scale for each of its rows, as one kernel makes them."""
    if not is_call(node, "quantize"):
        return False
    x, scale, zero = (*node.args, None)[:3]
    return (
        is_call(scale, "dynamic_scale")
        and scale.args[0] is x
        and scale.kwargs.get("group") == (group := node.kwargs.get("group"))
        and not (group and group % SMALLEST_GROUP)
        and zero == 128
        and node.kwargs["dtype"] == "uint8"
    )


def is_token_scale(node: fx.Node) -> bool:
    """A scale per row whose codes are made too."""
    return is_call(node, "dynamic_scale") and any(map(is_token_codes, node.users))


def is_widened_rows(node: fx.Node) -> bool:
    """The f32 form of rows looked up in a stored table of 16 bits, which nothing else reads."""
    rows = node.args[0]
    return (
        _widened_from(node) is not None
        and is_call(rows, "embedding")
        and rows.args[1].op == "get_attr"
        and len(rows.users) == 1
    )


def is_decoded_rows(node: fx.Node) -> bool:
    """Rows looked up in a stored table of codes and decoded, with one scale or one for each row of the table."""
    if not is_call(node, "dequantize") or not is_call(node.args[0], "embedding"):
        return False
    (ids, table), scale, zero = node.args[0].args, *(*node.args, None)[1:3]
    of_rows = (
        is_call(scale, "index_select")
        and scale.args[1] is ids
        and scale.kwargs["dim"] == 0
        and scale.args[0].op == "get_attr"
        and scale.args[0].meta["value"].shape == (table.meta["value"].shape[0], 1)
    )
    return (
        table.op == "get_attr"
        and (of_rows or scale.op == "get_attr" and not scale.meta["value"].rank)
        and not isinstance(zero, fx.Node)
        and all(len(n.users) == 1 for n in (node.args[0], scale) if is_call(n))
    )


def _follow_rows(function: Function, result: Plan) -> None:
    """What norms, and kernels that find a scale per token, take along."""
    order = {node: i for i, node in enumerate(function.nodes)}
    group_of = {member: group for group in result.groups.values() for member in group.members}
    for scale in filter(is_token_scale, function.calls("dynamic_scale")):
        x, codes = scale.args[0], tuple(filter(is_token_codes, scale.users))
        others = set(x.users) - {scale, *codes}
        if is_call(x, "layer_norm", "rms_norm"):
            result.tails[x] = Tail(None, scale, codes, bool(others))
            result.inner.update((scale, *codes))
            continue
        group = result.groups.get(x)
        if group and not group.anchors and not others and _fits_epilogue(group):
            del result.groups[x]
        else:
            group = None
        result.tails[scale] = Tail(group, None, codes, False)
        result.inner.update((*codes, *(group.members if group else ())))
    for head in function.calls("layer_norm", "rms_norm", *ATTENTIONS):
        groups = {id(g): g for u in head.users if (g := group_of.get(u)) and not g.anchors}
        if head in result.tails or len(groups) != 1:
            continue
        (group,) = groups.values()
        if result.groups.get(group.root) is group and _is_epilogue_of(head, group, order):
            result.tails[head] = Tail(group, kept=bool(set(head.users) - {*group.members}))
            del result.groups[group.root]
            result.inner.update(group.members)


def _is_epilogue_of(head: fx.Node, group: Group, order: dict[fx.Node, int]) -> bool:
    """Whether element-wise work can be done where the head is computed."""
    feeds = {o for m in group.members for o in m.all_input_nodes} - {*group.members}
    return (
        group.root.meta["value"].shape == head.meta["value"].shape
        and all(f.op == "get_attr" or order[f] <= order[head] for f in feeds)
        and _fits_epilogue(group)
    )


def _joined(anchors: tuple[fx.Node, ...], groups: list[Group]) -> Joined | None:
    """The groups as one; None when their epilogues are not the same work on operands that lie side by side."""
    if not any(g.members for g in groups):
        biases = tuple(map(bias_of, anchors))
        accumulator = ChainInput("accumulator", anchors[0].meta["value"].dtype)
        if not any(biases):
            return Joined(anchors, (), Chain((accumulator,), (), (0,)), ())
        chain = Chain((accumulator, ChainInput("column", accumulator.dtype)), (Step("add", (0, 1)),), (2,))
        return Joined(anchors, (), chain, (biases,))
    built = [build_chain(g) for g in groups]
    longest = max((chain for chain, _ in built), key=lambda chain: len(chain.steps))
    # a layer without a bias adds zeros beside those that have one
    built = [
        (longest, [*feeds, None]) if chain != longest and _biased(chain) == longest else (chain, feeds)
        for chain, feeds in built
    ]
    chains, feeds = zip(*built, strict=True)
    if len({*chains}) > 1:
        return None
    for kind, operands in zip((i.kind for i in chains[0].inputs[1:]), zip(*feeds, strict=True), strict=True):
        shared = kind in ("row", "scalar") and len({*operands}) == 1
        beside = kind == "column" and all(map(_is_stored_vector, operands))
        if not (shared or beside):
            return None
    members = tuple(m for g in groups for m in g.members)
    return Joined(anchors, members, chains[0], tuple(zip(*feeds, strict=True)))


def build_chain(group: Group, start: fx.Node | None = None) -> tuple[Chain, list[fx.Node]]:
    """The group's element-wise program and the nodes that feed it, in the order of the chain's inputs.

    The anchors' accumulators, or the value of ``start``, are the first inputs (not among the returned nodes); the
    anchors' biases are added first.
    """
    shape, anchors = group.root.meta["value"].shape, group.anchors
    starts = [start] if start is not None else anchors
    inside = {*starts, *group.members}
    feeds: list[fx.Node] = []
    for node in [*anchors, *group.members]:
        for operand in (bias_of(node),) if node in anchors else node.args:
            if isinstance(operand, fx.Node) and operand not in inside and operand not in feeds:
                feeds.append(operand)
    inputs = [ChainInput("accumulator", a.meta["value"].dtype) for a in starts]
    inputs += [ChainInput(input_kind(f.meta["value"].shape, shape), f.meta["value"].dtype) for f in feeds]
    index: dict[fx.Node, int] = {node: i for i, node in enumerate([*starts, *feeds])}
    steps: list[Step] = []

    def push(step: Step) -> int:
        steps.append(step)
        return len(inputs) + len(steps) - 1

    def operand(x: fx.Node | float, dtype: str | None) -> int | Const:
        """A chain operand converted to ``dtype`` (None: as it is)."""
        if not isinstance(x, fx.Node):
            return Const(_number(x, dtype))
        value = index[x]
        return value if dtype in (None, x.meta["value"].dtype) else push(Step("cast", (value,), dtype))

    for anchor in anchors:
        if (bias := bias_of(anchor)) is not None:
            index[anchor] = push(Step("add", (index[anchor], index[bias])))
    for node in group.members:
        name = node.target.elementwise
        if name in ("cast", "saturate"):
            index[node] = push(Step(name, (index[node.args[0]],), node.kwargs["dtype"]))
            continue
        wanted = _operand_dtypes(node)
        args = tuple(operand(x, dtype) for x, dtype in zip(node.args, wanted, strict=True))
        index[node] = push(Step(name, args))
    return Chain(tuple(inputs), tuple(steps), (index[group.root],)), feeds


def _operand_dtypes(node: fx.Node) -> list[str | None]:
    """The dtype each operand takes part in: torch's promotion, made explicit."""
    name, result = node.target.elementwise, node.meta["value"].dtype
    if name in LOGICAL:
        return ["bool"] * len(node.args)
    if name == "where":
        return ["bool", result, result]
    if name in COMPARISONS:
        common = promote(*(x.meta["value"] if isinstance(x, fx.Node) else x for x in node.args))
        return [common, common]
    return [result] * len(node.args)


def _number(x: float | int | bool, dtype: str | None) -> float | int | bool:
    if dtype is None:
        return x
    if dtype == "bool":
        return bool(x)
    return float(x) if dtype.startswith(("float", "bfloat")) else int(x)


def input_kind(shape: Shape, output: Shape) -> InputKind:
    """How an operand's shape relates to the output's; shapes outside the five kinds count as "full" (broadcast)."""
    if all(d == 1 for d in shape):
        return "scalar"
    if shape == output:
        return "full"
    if shape[-1] == output[-1] and all(d == 1 for d in shape[:-1]):
        return "column"
    if len(shape) == len(output) and shape[-1] == 1 and shape[:-1] == output[:-1]:
        return "row"
    return "full"


def _fits_epilogue(group: Group) -> bool:
    """Whether every feed of a group with an anchor has one of the five kinds exactly."""
    output = group.root.meta["value"].shape
    _, feeds = build_chain(group)
    return all(
        f.meta["value"].shape == output or input_kind(f.meta["value"].shape, output) != "full" for f in feeds
    )
