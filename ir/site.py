"""Sites: stable names for places in a program.

A place has up to two names. The one given at capture (``node.meta["site"]``, module path and role) survives
rewriting. The structural one (``block.3.attention.query``, ``block.3.ffn.up``, ``embedding.table``,
``head.linear``) is found from the graph each time, so a program whose source had no paths can be spoken of
just the same. Globs match either name; ``*`` stands for any characters, dots included.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from tersor.errors import InputError
from tersor.ir.program import Function, Program
from tersor.ir.structure import AttentionLayer, FeedForward, find_blocks, is_join, is_norm, residual_join

# Operations outside of blocks that get a structural name, beside everything that counts multiply-accumulates.
_KINDS = {"embedding": "table", "conv1d": "conv", "conv2d": "conv", "layer_norm": "norm", "rms_norm": "norm"}


@dataclass(frozen=True)
class Site:
    """A place in a program.

    Attributes:
        name: the name given at capture; the structural one where there is none.
        structural: the name found from the graph; None for places outside of any known structure.
        role: what the place does: "query", "qkv", "attention", "up", "norm", "table", ...; the operation's
        name where
            there is no structural name.
        function: the function's name.
        node: the operation.
    """

    name: str
    structural: str | None
    role: str
    function: str
    node: fx.Node


def sites(program: Program | Function) -> list[Site]:
    """All sites, in order."""
    functions = [program] if isinstance(program, Function) else program.functions.values()
    found = []
    for function in functions:
        structural = structural_names(function)
        for node in function.calls():
            name, other = node.meta.get("site"), structural.get(node)
            if name or other:
                found.append(Site(name or other, other, _role(node, other), function.name, node))
    return found


def select(program: Program | Function, only: Iterable[str] = ("*",), skip: Iterable[str] = ()) -> list[Site]:
    """The sites of which a name matches a glob in ``only`` and none matches a glob in ``skip``.

    Raises:
        InputError: a name without wildcards is the name of no site.
    """
    only, skip, everywhere = list(only), list(skip), sites(program)
    names = {n for s in everywhere for n in (s.name, s.structural) if n}
    for pattern in (*only, *skip):
        if pattern not in names and not re.search(r"[*?[]", pattern):
            raise _unknown(pattern, names)
    return [site for site in everywhere if _matches(site, only) and not _matches(site, skip)]


def find_site(program: Program | Function, name: str) -> Site:
    """The site with this name, given at capture or structural.

    Raises:
        InputError: there is none.
    """
    everywhere = sites(program)
    for site in everywhere:
        if name in (site.name, site.structural):
            return site
    raise _unknown(name, {n for s in everywhere for n in (s.name, s.structural) if n})


def structural_names(function: Function) -> dict[fx.Node, str]:
    """Names found from the dataflow alone, by node."""
    names = _Names()
    order = {node: i for i, node in enumerate(function.graph.nodes)}
    layers: dict[AttentionLayer | FeedForward, str] = {}
    for index, block in enumerate(find_blocks(function)):
        for layer in block.layers:
            kind = (
                "ffn" if isinstance(layer, FeedForward) else ("cross_" if layer.cross else "") + "attention"
            )
            layers[layer] = names.free(f"block.{index}.{kind}")
    for layer, name in layers.items():
        if isinstance(layer, AttentionLayer):
            _name_attention(layer, name, names)
        else:
            _name_feed_forward(layer, name, names)
    _name_norms(function, layers, names)
    inside = [order[node] for node in names.given]
    first, last = min(inside, default=len(order)), max(inside, default=-1)
    for node in function.calls():
        if node in names.given or (node.target.name not in _KINDS and node.target.macs is None):
            continue
        place = "embedding" if order[node] < first else "head" if order[node] > last else "other"
        names.give(node, f"{place}.{_KINDS.get(node.target.name, node.target.name)}")
    return names.given


class _Names:
    """Names handed out once: the second ``a.b`` is ``a.b_1``."""

    def __init__(self) -> None:
        self.given: dict[fx.Node, str] = {}
        self._used: dict[str, int] = {}

    def free(self, name: str) -> str:
        count = self._used.get(name, -1) + 1
        self._used[name] = count
        return f"{name}_{count}" if count else name

    def give(self, node: fx.Node | None, name: str) -> None:
        if node is not None and node not in self.given:
            self.given[node] = self.free(name)


def _name_attention(layer: AttentionLayer, name: str, names: _Names) -> None:
    names.given[layer.node] = name
    roles: dict[fx.Node, list[str]] = {}
    for role, node in (("query", layer.query), ("key", layer.key), ("value", layer.value)):
        if node is not None:
            roles.setdefault(node, []).append(role)
    for node, held in roles.items():
        names.give(node, f"{name}.{held[0] if len(held) == 1 else ''.join(r[0] for r in held)}")
    names.give(layer.output, f"{name}.output")
    for role, node in layer.rotary.items():
        names.give(node, f"{name}.{role}_rotary")
    for role, node in layer.norms.items():
        names.give(node, f"{name}.{role}_norm")


def _name_feed_forward(layer: FeedForward, name: str, names: _Names) -> None:
    names.give(layer.up, f"{name}.gate_up" if layer.gate is layer.up else f"{name}.up")
    names.give(layer.gate, f"{name}.gate")
    names.give(layer.activation, f"{name}.activation")
    names.give(layer.norm, f"{name}.inner_norm")
    names.give(layer.down, f"{name}.down")


def _name_norms(function: Function, layers: dict[AttentionLayer | FeedForward, str], names: _Names) -> None:
    """A norm belongs to the layer behind whose residual it stands (post-norm), or to the one that reads it."""
    joins = {residual_join(layer): name for layer, name in layers.items()}
    readers = {node: name for layer, name in layers.items() for node in _own_inputs(layer)}
    results = {layer.last: name for layer, name in layers.items()}
    for node in function.calls("layer_norm", "rms_norm"):
        operand = node.args[0]
        reading = [readers[u] for u in node.users if u in readers]
        if operand in results:  # between the layer and the residual
            names.give(node, f"{results[operand]}.post_norm")
        elif operand in joins and (_is_residual(node) or _adds_to_norm(operand, results)):
            names.give(node, f"{joins[operand]}.norm")
        elif reading and not _is_residual(node):
            names.give(node, f"{reading[0]}.norm")


def _own_inputs(layer: AttentionLayer | FeedForward) -> tuple[fx.Node | None, ...]:
    """What reads the stream that the layer adds to; a cross-attention's keys and values read another one."""
    return (layer.query,) if isinstance(layer, AttentionLayer) and layer.cross else layer.inputs


def _is_residual(node: fx.Node) -> bool:
    """Whether a value is itself carried on beside a layer: something is added to it."""
    return any(
        is_join(user) or (user.op == "call_function" and user.target.name == "cast" and _is_residual(user))
        for user in node.users
    )


def _adds_to_norm(join: fx.Node, results: Mapping[fx.Node, str]) -> bool:
    """Whether the stream that a join continues is itself the result of a norm."""
    return any(isinstance(a, fx.Node) and is_norm(a) and a.args[0] not in results for a in join.args)


def _matches(site: Site, patterns: Iterable[str]) -> bool:
    names = [n for n in (site.name, site.structural) if n]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _role(node: fx.Node, structural: str | None) -> str:
    return re.sub(r"_\d+$", "", structural.rpartition(".")[2]) if structural else node.target.name


def _unknown(name: str, names: Iterable[str]) -> InputError:
    near = difflib.get_close_matches(name, names, 3)
    return InputError(
        f"the program has no site {name!r}",
        fix=f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else "list them with tersor.ir.sites(program), or `tersor inspect MODEL`",
    )
