"""What the folds of norms have in common."""

from __future__ import annotations

from torch import fx

from tersor.ir import Function
from tersor.passes.sites import in_words, site_of
from tersor.passes.weights import is_plain_linear


def absorbing_linears(function: Function, norm: fx.Node) -> list[fx.Node] | str:
    """The linear layers that read a norm, if nothing else does; otherwise what stands in the way."""
    for user in norm.users:
        if user.op == "output":
            return "it is a result of the program"
        if user.target.name != "linear" or user.args[0] is not norm or norm in user.args[1:]:
            return f"it is also read by {in_words(user)}"
        if not is_plain_linear(function, user):
            return f"the weight or bias of {site_of(user)} is computed, not a parameter"
    return list(norm.users) or "nothing reads it"
