"""Stages: groups of passes that are kept only if what they cost is within a budget and they gain something.

The manager has no data and no compiler. Who has them injects two functions through the `Context`: `Evaluate` says how
faithful a program is to the captured model, `Measure` how long it takes on the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch

from tersor.errors import PipelineError
from tersor.ir import Program, run
from tersor.passes.agreement import Agreement
from tersor.passes.base import Pass
from tersor.passes.calibration import Batch
from tersor.passes.calibration.padding import Padding, Tokens
from tersor.passes.config import conform_fields
from tersor.passes.registry import make

OnFail = Literal["revert", "stop", "warn"]

NOISE = 0.02  # measured latencies within this fraction are the same


class Measure(Protocol):
    """Seconds per call of a program on the target, as if it were lowered; measured or modelled."""

    def __call__(self, program: Program) -> float: ...


class Profile(Protocol):
    """Seconds that each site of a program takes on the target, by name; what belongs to none is under ""."""

    def __call__(self, program: Program) -> Mapping[str, float]: ...


class Evaluate(Protocol):
    """Fidelity of a program to the captured model on held-out data, by the figures that `Budget` names.

    ``metric`` is the user's own measure of quality, where there is one; larger is better.
    """

    def __call__(self, program: Program) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Budget:
    """What a stage may cost. None leaves a figure free.

    Attributes:
        min_sqnr_db: signal to quantization noise of the outputs against the captured model, in decibels.
        min_cosine: cosine of the outputs with the captured model's.
        max_kl: divergence of the softmax of the outputs from the captured model's, in nats.
        max_drop: how far the user's ``metric`` may fall below its value before the stage.
        must_gain: whether the stage has to make the program faster or smaller.
    """

    min_sqnr_db: float | None = None
    min_cosine: float | None = None
    max_kl: float | None = None
    max_drop: float | None = None
    must_gain: bool = True

    def __post_init__(self) -> None:
        if problems := conform_fields(self):
            raise PipelineError(f"a budget is wrong: {'; '.join(problems)}")

    @property
    def needs(self) -> set[str]:
        """Names of the figures that have to be evaluated."""
        named = {"min_sqnr_db": "sqnr_db", "min_cosine": "cosine", "max_kl": "kl", "max_drop": "metric"}
        return {figure for option, figure in named.items() if getattr(self, option) is not None}

    def failures(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        """Why a stage fails, from the figures before and after it (fidelity, ``latency``, ``bytes``)."""
        found = []
        for figure, floor in (("sqnr_db", self.min_sqnr_db), ("cosine", self.min_cosine)):
            if floor is not None and not after[figure] >= floor:
                found.append(f"{figure} {after[figure]:.6g} is below {floor:g}")
        if self.max_kl is not None and not after["kl"] <= self.max_kl:
            found.append(f"kl {after['kl']:.4g} is above {self.max_kl:g}")
        if self.max_drop is not None and not before["metric"] - after["metric"] <= self.max_drop:
            drop = before["metric"] - after["metric"]
            found.append(f"metric fell by {drop:.4g} to {after['metric']:.6g}, more than {self.max_drop:g}")
        faster = "latency" in after and after["latency"] < before["latency"] * (1 - NOISE)
        if self.must_gain and not faster and not after["bytes"] < before["bytes"]:
            found.append("it is neither faster nor smaller")
        return found


@dataclass(frozen=True)
class Stage:
    """Passes that are judged together.

    Attributes:
        name: what reports call it.
        passes: in order.
        budget: what they may cost.
        on_fail: ``revert`` takes all of them back, ``stop`` ends the run with a `BudgetError`, ``warn`` keeps them.
    """

    name: str
    passes: tuple[Pass, ...]
    budget: Budget = Budget()
    on_fail: OnFail = "revert"

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(make(p) for p in self.passes))
        if not self.passes:
            raise PipelineError(f"stage {self.name!r} has no passes")
        if self.on_fail not in ("revert", "stop", "warn"):
            raise PipelineError(
                f"stage {self.name!r}: on_fail={self.on_fail!r}", fix="use revert, stop or warn"
            )

    def __str__(self) -> str:
        limits = [
            f"{f.name}={v!r}" for f in fields(Budget) if (v := getattr(self.budget, f.name)) != f.default
        ]
        return f"stage {self.name} ({', '.join([*limits, f'on_fail={self.on_fail}'])})"


class Fidelity:
    """The `Evaluate` that runs programs in torch: how near their outputs are to a reference program's.

    Outputs at padding are left out (see `tersor.passes.calibration.padding`).

    Args:
        reference: the captured program.
        batches: held-out inputs of ``main``, by name, torch or numpy, or as calibration keeps them; spooled, so that an
            iterator serves every evaluation.
        metric: the user's measure of a program's quality, larger is better.
    """

    def __init__(
        self,
        reference: Program,
        batches: Iterable[Mapping[str, torch.Tensor] | Batch],
        metric: Measure | None = None,
    ):
        self.batches = [
            batch
            if isinstance(batch, Batch)
            else Batch({name: torch.as_tensor(x) for name, x in batch.items()})
            for batch in batches
        ]
        self.metric = metric
        if not self.batches:
            raise PipelineError(
                "there are no held-out batches to evaluate with", fix="give inputs by name, in a list"
            )
        padding = Padding(reference.main)
        self._results = dict(zip(reference.main.outputs, reference.main.results, strict=True))
        self._tokens = [padding.of(batch.inputs, batch.mask) for batch in self.batches]
        self._expected = [
            self._floats(reference, *pair) for pair in zip(self.batches, self._tokens, strict=True)
        ]

    def __call__(self, program: Program) -> dict[str, float]:
        agreement, divergence, rows = Agreement(), 0.0, 0
        for batch, tokens, expected in zip(self.batches, self._tokens, self._expected, strict=True):
            for wanted, actual in zip(expected, self._floats(program, batch, tokens), strict=True):
                agreement.add(wanted, actual)
                log_wanted, log_actual = wanted.log_softmax(-1), actual.log_softmax(-1)
                divergence += (log_wanted.exp() * (log_wanted - log_actual)).sum().item()
                rows += wanted.numel() // wanted.shape[-1]
        figures = {
            "sqnr_db": agreement.sqnr_db,
            "cosine": agreement.cosine,
            "kl": divergence / max(rows, 1),
        }
        return figures | ({"metric": float(self.metric(program))} if self.metric else {})

    def _floats(self, program: Program, batch: Batch, tokens: Tokens) -> list[torch.Tensor]:
        """The float outputs as rows without padding, which is where the reference has it."""
        with torch.no_grad():
            results = run(program.main, batch.inputs)
        return [
            tokens.rows(self._results[name], t).double()
            for name, t in results.items()
            if t.is_floating_point() and t.ndim
        ]


def budget_from(config: Mapping[str, Any], where: str) -> Budget:
    """A budget from plain data.

    Raises:
        PipelineError: an option that a budget does not have.
    """
    known = [f.name for f in fields(Budget)]
    if unknown := [name for name in config if name not in known]:
        raise PipelineError(f"{where}: a budget has no {', '.join(unknown)}", fix=f"use {', '.join(known)}")
    return Budget(**config)
