"""What a pass is: its configuration, what it needs and gives, and what it says of its work."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import fx

from tersor.errors import PipelineError
from tersor.ir import Builder, Function, Program
from tersor.ir.matching import Match, Rule, apply_rules
from tersor.ir.site import select as select_sites
from tersor.passes.config import conform_fields, plain
from tersor.passes.context import Context
from tersor.passes.sites import site_of

if TYPE_CHECKING:
    from tersor.passes.calibration import Request


@dataclass(frozen=True)
class Exact:
    """The same operations on the same numbers.

    In the program's own types the results are equal but for the order in which a matrix library sums: 32 units in the
    last place of the largest result.
    """

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Equivalent:
    """The same results but for rounding: in float64, max |difference| <= rtol * max |result| for every output.

    New parameters are rounded to the program's own type, so for float32 ``rtol`` cannot be far below 1e-7.
    """

    rtol: float = 1e-6

    def __str__(self) -> str:
        return f"equivalent to {self.rtol:g}"


@dataclass(frozen=True)
class Lossy:
    """Other results on purpose; their error is measured and, in a stage, held to a budget."""

    def __str__(self) -> str:
        return "lossy"


Numerics = Exact | Equivalent | Lossy

STAGES = (
    "canonicalize", "fold", "attention", "prune.structured", "factorize", "prune.nm", "smooth",
    "quantize.weights", "quantize.activations", "recover.bias", "requantize", "lower",
)  # fmt: skip
"""The canonical order. What breaks otherwise: folds shrink what all later passes handle; pruning rows and columns
after factorization or sparsity would have to slice their structure; a factorized sparse matrix is dense; smoothing
scales depend on the final weights and the quantization grid on the scales; activation ranges measured before the
weights are final are wrong."""


@dataclass(frozen=True)
class Finding:
    """One place that a pass changed or left alone, and why; ``figures`` are what it measured there, by name."""

    site: str
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass
class PassResult:
    """What a pass did: places changed and places left alone, each with the reason.

    ``summary`` is for what holds of all places together, in a sentence; most passes have nothing to say there.
    """

    changes: list[Finding] = field(default_factory=list)
    skips: list[Finding] = field(default_factory=list)
    summary: str = ""

    def change(self, place: fx.Node | str, reason: str, **figures: float) -> None:
        """Says that the pass changed a place; name the node before it is replaced."""
        self.changes.append(Finding(site_of(place), reason, figures))

    def skip(self, place: fx.Node | str, reason: str, **figures: float) -> None:
        """Says that the pass looked at a place and left it alone."""
        self.skips.append(Finding(site_of(place), reason, figures))


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Pass(ABC):
    """A step that changes a program. Subclass it, annotate the configuration, write `run`, and `register` it.

    Annotated attributes are the configuration: a pass *is* its configuration, immutable, compared and hashed by it.
    The rest describes the pass:

    Attributes:
        only: glob patterns of the sites to work on; None means all.
        skip: glob patterns of the sites never to touch.
        name: what it is registered as; for an unregistered pass its class's name in snake case.
        numerics: what may happen to the results (`Exact`, `Equivalent`, `Lossy`); the manager holds it to that.
        stage: its place in the canonical order (`STAGES`); None: it belongs wherever it is put.
        acts_on: names of the operations whose sites it may change; empty means any.
        requires, forbids: facts (`tersor.passes.facts`) that must, or must not, hold at the sites it selects.
        provides: facts that hold at the sites it changed; the manager checks that they do.
        invalidates: facts that it may end; ending one that is not listed is an error.
        calibrated: whether it needs calibration data (a property where that depends on the configuration).
        optional: whether it is left out, instead of refused, where it needs calibration data and there is none.
        recovers: whether it works towards ``context.reference``, the program before the lossy passes.
    """

    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()

    name: ClassVar[str] = ""
    numerics: ClassVar[Numerics] = Lossy()
    stage: ClassVar[str | None] = None
    acts_on: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[Set[str]] = frozenset()
    forbids: ClassVar[Set[str]] = frozenset()
    provides: ClassVar[Set[str]] = frozenset()
    invalidates: ClassVar[Set[str]] = frozenset()
    calibrated: ClassVar[bool] = False
    optional: ClassVar[bool] = False
    recovers: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        dataclass(frozen=True, kw_only=True)(cls)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        for kind in ("requires", "forbids", "provides", "invalidates"):
            given = getattr(cls, kind)
            setattr(cls, kind, frozenset((given,) if isinstance(given, str) else given))
        if cls.stage is not None and cls.stage not in STAGES:
            raise PipelineError(
                f"pass {cls.name!r} names the stage {cls.stage!r}, which does not exist",
                fix=f"use one of {', '.join(STAGES)}, or None",
            )

    def __post_init__(self) -> None:
        for name in ("only", "skip"):
            if isinstance(patterns := getattr(self, name), str):
                object.__setattr__(self, name, (patterns,))
        problems = conform_fields(self)
        if not problems and (problem := self.problem()):
            problems.append(problem)
        if problems:
            raise PipelineError(f"the configuration of pass {self.name!r} is wrong: {'; '.join(problems)}")

    def problem(self) -> str | None:
        """What is wrong with the configuration beyond its types, in words; None when nothing is. For subclasses."""
        return None

    def requests(self, program: Program) -> Iterable[Request]:
        """The statistics that `run` looks up in ``context.statistics``; one sweep over the data gathers them all.

        Called with the copy that `run` gets, where there is calibration data. For subclasses.
        """
        return ()

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Changes the program in place and says where and why; parameters are replaced, never written to.

        The program is the manager's copy. Verifying, timing and measuring are the manager's work.
        """

    # -- configuration

    def config(self) -> dict[str, Any]:
        """The configuration as plain data (lists for tuples)."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The pass with this configuration; fields that are absent keep their defaults.

        Raises:
            PipelineError: an unknown field, or a value of the wrong type.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in config:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise PipelineError(
                    f"pass {cls.name!r} has no option {name!r}",
                    why=f"its options are {', '.join(known)}",
                    fix=f"did you mean {near[0]!r}?" if near else None,
                )
        return cls(**config)

    # -- places

    def select(self, program: Program, *operations: str) -> list[tuple[Function, fx.Node]]:
        """The nodes of these operations (default: ``acts_on``) that ``only`` and ``skip`` leave to the pass, in order.

        Raises:
            InputError: ``only`` or ``skip`` names, without wildcards, a site that the program does not have.
        """
        chosen = None if self.only is None else {site.node for site in select_sites(program, self.only)}
        protected = self.protected(program)
        return [
            (function, node)
            for function in program.functions.values()
            for node in function.calls(*(operations or self.acts_on))
            if node not in protected and (chosen is None or node in chosen)
        ]

    def protected(self, program: Program) -> set[fx.Node]:
        """The nodes that ``skip`` names: they must not change, even as neighbours of a selected one."""
        return {site.node for site in select_sites(program, self.skip)} if self.skip else set()

    def unselected(self, program: Program) -> set[fx.Node]:
        """All operation nodes that the pass must leave as they are."""
        selected = {node for _, node in self.select(program)}
        return {node for function in program.functions.values() for node in function.calls()} - selected

    def rewrite(self, program: Program, *rules: Rule) -> PassResult:
        """Applies rewrite rules (`tersor.ir.matching`) at the selected sites until none fires."""
        result, spared = PassResult(), self.unselected(program)
        for function in program.functions.values():
            report = apply_rules(function, [_recording(rule, spared, result) for rule in rules])
            near = [event for event in report.skipped if event.reason != _SPARED]
            result.skips += [Finding(event.place, f"{event.rule}: {event.reason}") for event in near]
        return result

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        options = ", ".join(f"{f.name}={plain(getattr(self, f.name))!r}" for f in changed)
        return f"{self.name}({options})" if options else self.name


dataclass(frozen=True, kw_only=True)(Pass)


_SPARED = "not selected"


def _recording(rule: Rule, spared: set[fx.Node], result: PassResult) -> Rule:
    """The rule, leaving ``spared`` nodes alone and noting where it fires."""

    def check(match: Match) -> str | None:
        return _SPARED if match.root in spared else rule.check(match)

    def rewrite(build: Builder, match: Match) -> fx.Node | None:
        result.change(match.root, rule.name)
        return rule.rewrite(build, match)

    return replace(rule, check=check, rewrite=rewrite)
