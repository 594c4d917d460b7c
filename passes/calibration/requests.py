"""What a pass asks for, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from tersor.errors import PipelineError
from tersor.ir import Function, Program
from tersor.ir.site import find_site
from tersor.passes.calibration.statistics import Statistic
from tersor.passes.sites import site_of

Split = Literal["fit", "held_out"]


@dataclass(frozen=True)
class Request:
    """A statistic of a value in a program.

    Attributes:
        site: an operation: its node, or the name of its site.
        what: which statistic, empty: ``MinMax()``, ``Samples(256)``.
        of: the operation's first operand, or its result.
        split: over the data to fit to, or over the data kept back to judge by.
    """

    site: fx.Node | str
    what: Statistic
    of: Literal["input", "output"] = "input"
    split: Split = "fit"

    def operation(self, program: Program) -> fx.Node:
        """The node of the operation.

        Raises:
            InputError: the program has no site of that name.
        """
        return find_site(program, self.site).node if isinstance(self.site, str) else self.site

    def value(self, program: Program) -> tuple[Function, fx.Node]:
        """The function and the node whose value is meant.

        Raises:
            InputError: the program has no site of that name.
            PipelineError: the operation reads no value, or is none of this program's.
        """
        node = self.operation(program)
        function = next((f for f in program.functions.values() if f.graph is node.graph), None)
        if function is None:
            raise PipelineError(
                f"the request for {site_of(node)} names an operation of another program",
                fix="take the nodes of the program that is calibrated",
            )
        if self.of == "output":
            return function, node
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise PipelineError(f"{site_of(node)} reads no value", fix="request of='output'")
        return function, node.args[0]


class Statistics:
    """The answers to requests."""

    def __init__(self, found: Mapping[Request, Statistic | None] | None = None):
        self._found = dict(found or {})

    def get(self, request: Request) -> Statistic | None:
        """The filled statistic; None when no data reached the value.

        Raises:
            PipelineError: nobody asked for it.
        """
        if request not in self._found:
            raise PipelineError(
                f"{request.what.key} of the {request.of} of {site_of(request.site)} was not requested",
                fix="return the request from the pass's requests(program)",
            )
        return self._found[request]

    def __len__(self) -> int:
        return len(self._found)
