"""Which values lie in the memory of a state while a function is lowered, and whether that may be overwritten."""

from __future__ import annotations

from torch import fx

from tersor.codegen.fusion import Plan
from tersor.ir.program import Function, is_state
from tersor.ir.state import in_place

# Their results are read, or may be, where their operand lies.
_LOOKED_THROUGH = {"reshape", "permute", "expand", "slice", "cast"}


class StateMemory:
    """Follows a function in the order in which code is emitted for it; call `made` for every node.

    A kernel reads its operands when it is called, so the old value of a state may be overwritten once all kernels
    that read it have been. Where one comes later, the update has to go to new memory.
    """

    def __init__(self, function: Function, plan: Plan):
        self._chain = in_place(function)
        self._made: set[fx.Node] = set()
        self._holds: dict[fx.Node, str] = {}  # node -> the state whose memory it lies in
        self._call: dict[fx.Node, fx.Node] = {}  # node inside a group -> the node whose kernel reads for it
        for group in plan.groups.values():
            self._call |= dict.fromkeys([*group.members, *group.anchors], group.root)
        for attention, joined in plan.joined.items():
            self._call |= dict.fromkeys([*joined.members, *joined.anchors], attention)
        for node, tail in plan.tails.items():
            self._call |= dict.fromkeys(tail.nodes, node)

    def made(self, node: fx.Node) -> None:
        """The node's value has been computed; an operation other than ``cache_update`` by reading, or as a view."""
        self._made.add(node)
        if is_state(node):
            self._holds[node] = node.target
        elif node in self._chain and node.target.name == "reshape" and node.args[0] in self._holds:
            self._holds[node] = self._holds[node.args[0]]

    def of(self, node: fx.Node) -> str | None:
        """The state in whose memory a value lies."""
        return self._holds.get(node)

    def may_share(self, node: fx.Node) -> bool:
        """Whether a value may be memory of a state."""
        while node not in self._holds:
            if node.op != "call_function" or node.target.name not in _LOOKED_THROUGH:
                return False
            node = node.args[0]
        return True

    def may_overwrite(self, update: fx.Node) -> bool:
        """Whether this ``cache_update`` may write where its state lies; if so, it does."""
        name = self._holds.get(update.args[0])
        if name is None or self._chain.get(update) != name or self._is_read_later(name, update):
            return False
        self._holds[update] = name
        return True

    def _is_read_later(self, name: str, update: fx.Node) -> bool:
        stack, seen = [n for n, held in self._holds.items() if held == name], set()
        while stack:
            value = stack.pop()
            for user in value.users:
                if user is update and list(user.all_input_nodes).count(value) == 1 and user.args[0] is value:
                    continue
                if user in seen or self._holds.get(user) == name:
                    continue
                seen.add(user)
                if self._call.get(user, user) not in self._made:
                    return True
                if user.target.name in _LOOKED_THROUGH:
                    stack.append(user)
        return False
