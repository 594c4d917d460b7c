"""Which places of a program stand for which in its reference, and which of them can be corrected towards it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Pass, PassResult
from tersor.passes.quantize.places import bias_of
from tersor.passes.sites import names


def counterparts(program: Program, reference: Program, *operations: str) -> dict[fx.Node, fx.Node]:
    """The operations of these names in ``main`` that have one of the same site, operation and shape in the reference.

    Sites without a name, and names that several operations share, have none.
    """
    found = _by_name(reference, operations)
    pairs = {node: found[name] for name, node in _by_name(program, operations).items() if name in found}
    return {n: o for n, o in pairs.items() if n.target is o.target and n.meta["value"] == o.meta["value"]}


def correctable(
    pass_: Pass,
    program: Program,
    before: Mapping[fx.Node, fx.Node],
    obstacle: Callable[[Function, fx.Node], str | None],
    stored: Callable[[fx.Node], str | None],
    result: PassResult,
) -> dict[fx.Node, list[fx.Node]]:
    """The selected linear layers of ``main`` to correct, each with those of other functions that change along.

    Args:
        before: `counterparts` of the layers.
        obstacle: why a layer is not for this pass; None where it is.
        stored: the parameter that holds a layer's weight, which others may read too.
        result: gets the layers that are left alone.
    """
    readers: dict[str, list[fx.Node]] = {}
    for function in program.functions.values():
        for linear in function.calls("linear"):
            if name := stored(linear):
                readers.setdefault(name, []).append(linear)
    found, spared = {}, pass_.protected(program)
    for function, linear in pass_.select(program):
        if (reason := obstacle(function, linear)) is not None:
            result.skip(linear, reason)
            continue
        sharing = [n for n in readers.get(stored(linear), ()) if n is not linear]
        others = [n for n in sharing if n.graph is not linear.graph]
        bias = bias_of(linear)
        if function is not program.main:
            result.skip(
                linear,
                f"it is corrected together with the layer of {program.main.name!r} that has its weights, if any",
            )
        elif bias is not None and function.parameter(bias) is None:
            result.skip(linear, "its bias is computed")
        elif others and len(others) < len(sharing):
            result.skip(linear, "its weights are shared with layers of this function and of others")
        elif spared & set(others) or any(_bias_name(n) != _bias_name(linear) for n in others):
            result.skip(linear, "layers of other functions with its weights cannot change along")
        elif linear not in before:
            result.skip(linear, "no earlier version of it is known")
        else:
            found[linear] = others
    return found


def _bias_name(linear: fx.Node) -> str | None:
    bias = bias_of(linear)
    return None if bias is None else str(bias.target)


def _by_name(program: Program, operations: tuple[str, ...]) -> dict[str, fx.Node]:
    by_name: dict[str, list[fx.Node]] = {}
    for node, name in names(program).items():
        if node.graph is program.main.graph and node.target.name in operations and not name.startswith("%"):
            by_name.setdefault(name, []).append(node)
    return {name: nodes[0] for name, nodes in by_name.items() if len(nodes) == 1}
