"""Sites: a stable name for every place that matters, from module paths and roles."""

from __future__ import annotations

from collections import Counter

from torch import fx

from tersor.ir.program import TOLD_SITE, Function

# Operations that reports, budgets and per-site choices speak of.
SITED = frozenset({
    "linear", "matmul", "conv1d", "conv2d", "embedding", "attention", "rotary_embedding", "layer_norm", "rms_norm",
    "softmax", "gelu", "gelu_tanh", "gelu_sigmoid", "silu", "relu", "tanh", "sigmoid",
})  # fmt: skip
_WEIGHT = {"embedding": 1, "linear": 1, "conv1d": 1, "conv2d": 1, "layer_norm": 1, "rms_norm": 1}


def assign_sites(function: Function) -> None:
    """Names the places of a function that have no site yet.

    A module's only operation is called like the module, as is one that owns the module's weight:
    ``encoder.layer.3.attention.self.query``. Others get a role: the name of their own weight
    (``layers.0.self_attn.out_proj``), or of the operation (``encoder.layer.3.attention.self.attention``). What the
    source of the program tells goes before.
    """
    _take_told(function)
    nodes = [n for n in function.calls() if n.target.name in SITED]
    paths = Counter(n.meta.get("module", "") for n in nodes)
    inner = {path.rsplit(".", i)[0] for path in paths for i in range(1, path.count(".") + 1)}
    taken = {n.meta["site"] for n in function.calls() if n.meta.get("site")}
    for node in nodes:
        if node.meta.get("site"):
            continue
        site = _site(
            node, single=paths[node.meta.get("module", "")] == 1, leaf=node.meta.get("module") not in inner
        )
        unique, count = site, 0
        while unique in taken:
            count += 1
            unique = f"{site}_{count}"
        taken.add(unique)
        node.meta["site"] = unique


def _take_told(function: Function) -> None:
    """Sites that the source tells, each for one operation of the kind that it is told of."""
    taken: set[str] = set()
    for node in function.calls():
        operation, site = node.meta.pop(TOLD_SITE, ("", ""))
        if operation == node.target.name and site not in taken:
            node.meta["site"] = site
            taken.add(site)


def _site(node: fx.Node, single: bool, leaf: bool) -> str:
    module, owner = node.meta.get("module", ""), _owner(node)
    if owner is not None and (owner == module or owner.startswith(f"{module}.") or not module):
        return owner
    if single and leaf and module:
        return module
    return f"{module}.{node.target.name}" if module else node.target.name


def _owner(node: fx.Node) -> str | None:
    """Where the node's weight lives: its name without "weight", which may be in codes."""
    index = _WEIGHT.get(node.target.name)
    weight = node.args[index] if index is not None and len(node.args) > index else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return weight.target.removesuffix(".codes").removesuffix("weight").rstrip("._") or None
