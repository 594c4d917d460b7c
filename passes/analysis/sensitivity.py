"""What each site costs when nothing else is quantized, measured on data that was held out.

One copy of the program per scheme is quantized as a whole, by the passes that do it anyway. Each of its sites is then
run in the place of the original one: a batch goes through the original program once, and at every site the rest of the
program is run again from the rounded result. A batch thus costs about half a run of the program per site and scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tersor.errors import InputError, TersorError
from tersor.ir import Function, Program, run
from tersor.ir.costs import cost, evaluated, node_cost
from tersor.ir.interpreter import bind, execute, resolve
from tersor.ir.matching import is_call
from tersor.passes.agreement import Agreement
from tersor.passes.analysis.result import Analysis, Outcome, SiteAnalysis
from tersor.passes.base import Pass
from tersor.passes.calibration import (
    Batch,
    Calibration,
    Dataset,
    Histogram,
    MinMax,
    Request,
    Statistic,
    Statistics,
    calibrate,
)
from tersor.passes.calibration.padding import Padding, Tokens
from tersor.passes.calibration.sweep import progress, running
from tersor.passes.checks import idle_patterns
from tersor.passes.context import Context
from tersor.passes.gates import Profile
from tersor.passes.quantize.bf16 import BFloat16
from tersor.passes.quantize.dynamic import DynamicActivations
from tersor.passes.quantize.embeddings import EmbeddingTables
from tersor.passes.quantize.rtn import RoundToNearest
from tersor.passes.quantize.static import StaticActivations
from tersor.passes.sites import names, shares, site_of

SCHEMES: Mapping[str, tuple[type[Pass], ...]] = {
    "int8": (EmbeddingTables, RoundToNearest, StaticActivations),
    "int8-dynamic": (EmbeddingTables, RoundToNearest, DynamicActivations),
    "bf16": (BFloat16,),
}
"""Ways to quantize a site: the passes that do it, which leave the site's node where it is."""

_INTEGER = ("integer_linear", "grouped_integer_linear")
_LOOKED_AT = ("linear", "attention", *_INTEGER, "embedding")


def analyze(
    program: Program,
    calibration: Any,
    *,
    schemes: Sequence[str] = tuple(SCHEMES),
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    batches: int = 4,
    profile: Profile | None = None,
    cache: str | Path | None = None,
    step: Callable[[str], None] | None = None,
) -> Analysis:
    """Quantizes each linear layer, attention and table of ``main`` alone, in every way that applies to it.

    Grids of static activations are chosen on the data to fit to, in the program as it is; errors are those on data
    that is held out. Padding is left out of both.

    Args:
        calibration: batches in any form that `Calibration` takes, one of those, or data as it was read for ``main``.
        schemes: of `SCHEMES`.
        only, skip: globs of sites, as passes take them.
        batches: held-out batches to compare outputs on, at most.
        profile: seconds that each site takes on the target; without it there are no shares of latency.
        cache: folder for statistics (see `tersor.passes.calibration.calibrate`).
        step: called with the name of each step as it starts.

    Raises:
        InputError: there is no data, it does not fit the program, or an option is wrong.
    """
    check_options(calibration, schemes, batches)
    step = step or (lambda name: None)
    step("calibrating")
    dataset = (
        calibration
        if isinstance(calibration, Dataset)
        else Dataset.read(Calibration.of(calibration), program.main)
    )
    only, skip = (x if x is None or isinstance(x, str) else tuple(x) for x in (only, skip))
    chosen = RoundToNearest(only=only, skip=skip)
    found = [(f, n) for f, n in chosen.select(program, *_LOOKED_AT)]
    named = names(program)
    sites = [_Site(node, named[node]) for function, node in found if function is program.main]
    skipped = {
        named[n]: f"only {program.main.name} is run on data" for f, n in found if f is not program.main
    }
    observed = _observed(program, [n for _, n in found if is_call(n, "linear")], dataset, cache)
    places = {"only": chosen.only, "skip": chosen.skip}
    variants = {
        scheme: _Variant(program, [made(**places) for made in SCHEMES[scheme]], observed)
        for scheme in schemes
    }
    for site in sites:
        for scheme, variant in variants.items():
            if (reason := variant.refusal(site.node)) is not None:
                site.refused[scheme] = reason
            elif is_call(site.node, *variant.acts_on):
                site.trials[scheme] = _Trial()
    tried = [site for site in sites if site.trials]
    held_out = [dataset.held_out[i] for i in range(min(batches, len(dataset.held_out)))]
    count = sum(len(site.trials) for site in tried)
    step(f"quantizing {len(tried)} sites alone, in {count} ways on {len(held_out)} held-out batches")
    with progress("quantizing sites", count * len(held_out)) as advance:
        padding = Padding(program.main)
        for name, batch in zip(dataset.held_out.names, held_out, strict=False):
            tokens = padding.of(batch.inputs, batch.mask)
            with running(name):
                _walk(program.main, tried, variants, batch, tokens, advance)
    notes = [*dataset.notes, *(f"{idle.site}: {idle.reason}" for idle in idle_patterns(chosen, program))]
    parts: Mapping[str, float] = {}
    if profile is not None:
        step("timing")
        try:
            parts = shares(profile(program))
        except TersorError as error:
            notes.append(f"latency was not measured: {error}")
    macs = cost(program).functions[program.main.name].macs
    reached = [site for site in tried if all(trial.outputs.signal for trial in site.trials.values())]
    rows = [_row(program.main, site, variants, observed, macs, parts.get(site.name)) for site in reached]
    order = {scheme: i for i, scheme in enumerate(schemes)}
    rows.sort(key=lambda row: min((order[s], o.output_sqnr_db) for s, o in row.outcomes.items())[1])
    for site in sites:
        if not site.trials:
            skipped[site.name] = next(iter(site.refused.values()), "no scheme is for its operation")
        elif site not in reached:
            unseen = is_call(site.node, "linear") and observed[Request(site.node, MinMax())] is None
            nothing = "no calibration data reaches it"
            skipped[site.name] = nothing if unseen else "the program's outputs are zero on the held-out data"
    return Analysis(tuple(rows), tuple(schemes), skipped, len(held_out), tuple(notes))


def check_options(calibration: Any, schemes: Sequence[str], batches: int) -> None:
    """InputError for options that are wrong whatever the program; also for callers that have work to do before."""
    if calibration is None:
        raise InputError(
            "an analysis needs calibration data, and there is none",
            why="it measures what rounding does to values inside the program",
            fix="give calibration=batches, inputs as the model will see them",
        )
    if not isinstance(calibration, Dataset):
        Calibration.of(calibration)
    if unknown := [scheme for scheme in schemes if scheme not in SCHEMES]:
        raise InputError(f"there is no scheme {', '.join(unknown)}", fix=f"use {', '.join(SCHEMES)}")
    if not schemes or batches < 1:
        raise InputError("there is nothing to measure", fix="give at least one scheme and one batch")


@dataclass
class _Trial:
    """One scheme at one site: results of the site, with all and with one operand rounded, and of the program."""

    site: Agreement = field(default_factory=Agreement)
    by_input: Agreement = field(default_factory=Agreement)
    by_weights: Agreement = field(default_factory=Agreement)
    outputs: Agreement = field(default_factory=Agreement)


@dataclass(eq=False)
class _Site:
    node: fx.Node
    name: str
    trials: dict[str, _Trial] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class _Variant:
    """A copy of a program with every site quantized; single sites of it are run on values of the original."""

    def __init__(
        self, program: Program, passes: Sequence[Pass], observed: Mapping[Request, Statistic | None]
    ):
        copy = program.copy()
        self.function = copy.main
        copied: dict[fx.Node, fx.Node] = {}
        for name, function in program.functions.items():
            copied.update(zip(function.graph.nodes, copy.functions[name].graph.nodes, strict=True))
        # ranges are those of the original: what is rounded elsewhere does not count
        answers = {Request(copied[request.site], request.what): found for request, found in observed.items()}
        context = Context(statistics=Statistics(answers))
        self._copied, self._original = copied, {new: old for old, new in copied.items()}
        self._reasons: dict[str, str] = {}
        self._changed: dict[
            str, set[str]
        ] = {}  # by operation: what the last pass that acts on it has changed
        for pass_ in passes:
            result = pass_.run(copy, context)
            self._changed |= dict.fromkeys(pass_.acts_on, {finding.site for finding in result.changes})
            for finding in result.skips:
                self._reasons.setdefault(finding.site, finding.reason)

    def refusal(self, node: fx.Node) -> str | None:
        """Why the passes left a site as it is; None when they did not, or never look at its operation."""
        if is_call(node, *_INTEGER):
            return "it is quantized already"
        site = site_of(self._copied[node])
        return None if site in self._changed.get(node.target.name, ()) else self._reasons.get(site)

    @property
    def acts_on(self) -> tuple[str, ...]:
        """The operations that the passes quantize."""
        return tuple(self._changed)

    def node(self, original: fx.Node) -> fx.Node:
        """The quantized form of a node."""
        return self._copied[original]

    def results(
        self, site: fx.Node, values: Mapping[fx.Node, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[fx.Node, torch.Tensor]:
        """The quantized site and its operands, from the values of the original program by its nodes."""
        node = self._copied[site]
        needed, stack = {node}, [node]
        start: dict[fx.Node, torch.Tensor] = {}
        while stack:
            for operand in stack.pop().all_input_nodes:
                original = self._original.get(operand)
                if original in values and original.op != "get_attr":
                    start[operand] = values[original]
                elif operand not in needed:
                    needed.add(operand)
                    stack.append(operand)
        ordered = [n for n in self.function.graph.nodes if n in needed]
        execute(self.function, ordered, start, sizes, keep={node, *node.all_input_nodes})
        return start


def _observed(
    program: Program, linears: Sequence[fx.Node], dataset: Dataset, cache: str | Path | None
) -> dict[Request, Statistic | None]:
    """Range and distribution of the inputs of linear layers, from one sweep."""
    requests = [Request(linear, what) for linear in linears for what in (MinMax(), Histogram())]
    answers = calibrate(program, requests, dataset, cache=cache)
    return {request: answers.get(request) for request in requests}


def _walk(
    function: Function, sites: Sequence[_Site], variants: Mapping[str, _Variant], batch: Batch, tokens: Tokens,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Takes one batch through the program, trying every site on the way."""
    expected = _outputs(function, run(function, batch.inputs), tokens)
    values, sizes = bind(function, batch.inputs, None)
    nodes = function.nodes[:-1]
    last_use = {operand: i for i, node in enumerate(nodes) for operand in (node, *node.all_input_nodes)}
    last_use.update(dict.fromkeys(function.results, len(nodes)))
    by_node = {site.node: site for site in sites}
    done = 0
    for place, node in enumerate(nodes):
        if node not in by_node:
            continue
        execute(
            function,
            nodes[done:place],
            values,
            sizes,
            keep={n for n, last in last_use.items() if last >= place},
        )
        done = place
        exact = _apply(node, values, sizes)
        for scheme, trial in by_node[node].trials.items():
            made = variants[scheme].results(node, values, sizes)
            rounded = made[variants[scheme].node(node)].to(exact.dtype)  # rows of a table in 16 bits are such
            wanted = tokens.rows(node, exact)
            trial.site.add(wanted, tokens.rows(node, rounded))
            if is_call(node, "linear"):
                x, weight = variants[scheme].node(node).args[:2]
                x_alone = _apply(node, {**values, node.args[0]: made[x]}, sizes)
                weight_alone = _apply(node, {**values, node.args[1]: made[weight]}, sizes)
                trial.by_input.add(wanted, tokens.rows(node, x_alone))
                trial.by_weights.add(wanted, tokens.rows(node, weight_alone))
            after = {**values, node: rounded}
            execute(function, nodes[place + 1 :], after, sizes, keep=set(function.results))
            results = dict(zip(function.outputs, (after[n] for n in function.results), strict=True))
            for pair in zip(expected, _outputs(function, results, tokens), strict=True):
                trial.outputs.add(*pair)
            advance()


def _apply(node: fx.Node, values: Mapping[fx.Node, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor:
    operands = fx.map_arg(node.args, values.__getitem__)
    return node.target(*operands, **{name: resolve(value, sizes) for name, value in node.kwargs.items()})


def _outputs(function: Function, results: Mapping[str, torch.Tensor], tokens: Tokens) -> list[torch.Tensor]:
    """The float results as rows without padding."""
    return [
        tokens.rows(node, results[name])
        for name, node in zip(function.outputs, function.results, strict=True)
        if results[name].is_floating_point() and results[name].ndim
    ]


def _row(
    function: Function, site: _Site, variants: Mapping[str, _Variant],
    observed: Mapping[Request, Statistic | None], macs: int, latency_share: float | None,
) -> SiteAnalysis:  # fmt: skip
    node, linear = site.node, is_call(site.node, "linear")
    own = evaluated(node_cost(node).macs, {name: limits.max for name, limits in function.dims.items()})
    extent = observed.get(Request(node, MinMax()))
    weight = function.parameter(node.args[1]) if linear else None
    outcomes = {
        scheme: Outcome(
            sqnr_db=trial.site.sqnr_db,
            input_sqnr_db=trial.by_input.sqnr_db if linear else None,
            weights_sqnr_db=trial.by_weights.sqnr_db if linear else None,
            output_sqnr_db=trial.outputs.sqnr_db,
            output_cosine=trial.outputs.cosine,
            bytes=_stored(variants[scheme].function, variants[scheme].node(node).args[1:]),
        )
        for scheme, trial in site.trials.items()
    }
    return SiteAnalysis(
        site=site.name,
        op=node.target.name,
        macs=own,
        macs_share=own / max(macs, 1),
        bytes=_stored(function, node.args[1:]),
        input_ratio=None if extent is None else _spread(extent.absmax),
        weight_ratio=None if weight is None else _spread(weight.abs().amax(0)),
        latency_share=latency_share,
        outcomes=outcomes,
        skipped=dict(site.refused),
    )


def _spread(magnitudes: torch.Tensor) -> float:
    """The largest over the median; 1 where both are 0."""
    largest, median = magnitudes.max().item(), magnitudes.median().item()
    return largest / median if median else (float("inf") if largest else 1.0)


def _stored(function: Function, operands: Iterable[Any]) -> int:
    """Bytes of the parameters that operands are, or are decoded from."""
    total = 0
    for operand in operands:
        if is_call(operand, "dequantize", "cast"):
            total += _stored(function, operand.args)
        elif (tensor := function.parameter(operand)) is not None:
            total += tensor.nbytes
    return total
