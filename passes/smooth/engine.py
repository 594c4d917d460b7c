"""One engine for all smoothing passes: it finds the places, asks the pass for s and z, and keeps what helps.

A pass of this family only says how to choose s and z (`Smoothing.candidates`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.calibration import MinMax, Request, Samples, Statistics, no_range
from tersor.passes.context import Context
from tersor.passes.quantize.grid import GROUP, group_problem
from tersor.passes.smooth.error import Activations, Observed, Rounding, Trial
from tersor.passes.smooth.places import Place, hidden_place, norm_place, value_place
from tersor.passes.weights import WeightChange, apply_changes, is_plain_linear

KINDS = ("value", "hidden", "activation", "norm", "residual")
"""Kinds of places in the order in which they change: norms last, since their s depends on all rows of the weights
behind them, which the others change."""

GAIN = 0.99
"""A place is smoothed where its error falls, and that on held-out data at least to this fraction."""

BALANCED = 1e-3
"""s this near to 1, and z this small beside the range, are no change."""


@dataclass(frozen=True)
class Candidate:
    """One way to smooth a place: positive s [channels], z [channels] or None, and in words how it was chosen."""

    s: torch.Tensor
    z: torch.Tensor | None
    words: str


@dataclass(frozen=True)
class _Choice:
    """The best candidate for one way of rounding, and the held-out error without and with it.

    row_error: that of a row against its own outputs, with the candidate where it helps, else without.
    """

    candidate: Candidate
    before: float
    after: float
    helps: bool
    row_error: float


class Smoothing(Pass):
    """Base of the smoothing passes.

    Options:
        bits: of the codes that weights and activations are going to be rounded to.
        activations: "tensor" for static grids, "token" for dynamic ones.
        group: most channels that share a dynamic grid (None: all do), as in quantize.dynamic.
        largest_error: a place where even then the outputs of a token would lose a larger part of their power, in the
            mean, is smoothed for grids per token; give quantize.static the same, and quantize.dynamic the rest.
        kinds: kinds of places to look at (`tersor.passes.smooth.places`).
        samples: rows of a value that candidates are tried on, and as many held out to judge by.
        optional: whether the pass is left out, instead of refused, where there is no calibration data.
    """

    bits: int = 8
    activations: Activations = "tensor"
    group: int | None = GROUP
    largest_error: float | None = None
    kinds: tuple[str, ...] = KINDS
    samples: int = 256
    optional: bool = False

    numerics = Equivalent(1e-5)
    stage = "smooth"
    acts_on = ("layer_norm", "rms_norm", "attention", "linear")
    forbids = {"quantized"}
    invalidates = {"factorized"}  # a shift gives the thin first layer a bias
    calibrated = True

    def problem(self) -> str | None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            return f"kinds: {', '.join(unknown)} should be of {', '.join(KINDS)}"
        if not 2 <= self.bits <= 8:
            return f"bits = {self.bits} should be 2 to 8"
        if self.largest_error is not None and self.largest_error <= 0:
            return f"largest_error = {self.largest_error} should be positive"
        if problem := group_problem(self.group):
            return problem
        return None if self.samples > 0 else f"samples = {self.samples} should be positive"

    @abstractmethod
    def candidates(self, place: Place, observed: Observed) -> Iterable[Candidate]:
        """Ways to smooth a place; channels that are tied in ``place`` are given alike and must be treated alike."""

    def requests(self, program: Program) -> list[Request]:
        return [request for place in self._places(program) for request in self._requests(place)]

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        for node, reason in self._obstacles(program):
            result.skip(node, reason)
        for kind in KINDS:
            changes = []
            for place in self._places(program):
                if place.kind == kind:
                    observed = self._observed(place, context.statistics)
                    change = (
                        observed if isinstance(observed, str) else self._improved(place, observed, result)
                    )
                    if isinstance(change, str):
                        result.skip(place.anchor, change)
                    elif change is not None:
                        changes.append(change)
            apply_changes(self, program, changes, result)
        return result

    # -- places

    def _found(self, program: Program) -> Iterator[tuple[fx.Node, Place | str]]:
        """Every place by its anchor, or an operation and why there is none."""
        values = set()
        for function, node in self.select(program):
            place = _place_at(function, node)
            if isinstance(place, str):
                yield node, place
            elif place is not None and place.value not in values:
                values.add(place.value)
                known = place.kind in self.kinds
                yield place.anchor, place if known else f"kinds= leaves out places of kind {place.kind!r}"

    def _places(self, program: Program) -> list[Place]:
        return [place for _, place in self._found(program) if isinstance(place, Place)]

    def _obstacles(self, program: Program) -> list[tuple[fx.Node, str]]:
        return [(node, reason) for node, reason in self._found(program) if isinstance(reason, str)]

    # -- choosing

    def _requests(self, place: Place) -> tuple[Request, Request, Request]:
        value, rows = place.value, Samples(self.samples)
        return (
            Request(value, MinMax(), of="output"),
            Request(value, rows, of="output"),
            Request(value, rows, of="output", split="held_out"),
        )

    def _observed(self, place: Place, statistics: Statistics) -> Observed | str:
        bounds, fit, held_out = (statistics.get(request) for request in self._requests(place))
        if reason := no_range(bounds if held_out is not None else None, "its value"):
            return reason
        return Observed(
            -place.largest(-bounds.low.float()),
            place.largest(bounds.high.float()),
            fit.rows.float(),
            held_out.rows.float(),
            [weight.float() for weight in place.weights],
        )

    def _improved(self, place: Place, observed: Observed, result: PassResult) -> WeightChange | None:
        """The change by the best candidate; None, with the reason in ``result``, when none helps."""
        candidates = [c for c in self.candidates(place, observed) if not _is_nothing(c, observed)]
        if not candidates:
            result.skip(place.anchor, "it is balanced already")
            return None
        choice = self._best(candidates, observed, self.activations)
        if self.largest_error is not None and choice.row_error > self.largest_error:
            choice = self._best(candidates, observed, "token")
        best = choice.candidate
        figures = {"error_before": choice.before, "error_after": choice.after}
        if not choice.helps:
            result.skip(place.anchor, f"{best.words} would not lower its error", **figures)
            return None
        s, z = best.s.double(), None if best.z is None else best.z.double()
        change = place.change(s, z, f"{place.kind}: {best.words}")
        change.figures.update(figures)
        return change

    def _best(self, candidates: list[Candidate], observed: Observed, activations: Activations) -> _Choice:
        rounding = Rounding(self.bits, activations, self.group)
        fit, held_out = (Trial(observed, rows, rounding) for rows in (observed.fit, observed.held_out))
        fitted = [fit.error(c.s, c.z) for c in candidates]
        best = candidates[fitted.index(min(fitted))]
        before, after = held_out.error(), held_out.error(best.s, best.z)
        # better on both: what is best already stays, however held-out data falls
        helps = min(fitted) <= fit.error() and after <= GAIN * before
        return _Choice(
            best, before, after, helps, held_out.error_of_a_row(*((best.s, best.z) if helps else ()))
        )


def _place_at(function: Function, node: fx.Node) -> Place | str | None:
    if node.target.name in ("layer_norm", "rms_norm"):
        return norm_place(function, node)
    if node.target.name == "attention":
        return value_place(function, node)
    return hidden_place(function, node) if is_plain_linear(function, node) else None


def _is_nothing(candidate: Candidate, observed: Observed) -> bool:
    still = candidate.z is None or bool((candidate.z.abs() <= BALANCED * observed.absmax.max()).all())
    return still and bool(((candidate.s - 1).abs() <= BALANCED).all())
