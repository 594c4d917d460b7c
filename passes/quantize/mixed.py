"""As few bits per layer and table as a budget allows."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx
from torch import fx

from tersor.errors import PipelineError
from tersor.ir import Program
from tersor.ir.matching import is_call
from tersor.ir.text import human_bytes
from tersor.passes.analysis import Analysis, analyze
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.calibration import calibrate
from tersor.passes.context import Context
from tersor.passes.gates import Fidelity
from tersor.passes.quantize.allocation import Allocation, Option, allocate
from tersor.passes.quantize.bf16 import BFloat16
from tersor.passes.quantize.dynamic import DynamicActivations
from tersor.passes.quantize.embeddings import EmbeddingTables
from tersor.passes.quantize.gptq import GPTQ
from tersor.passes.quantize.places import plain_weight, readers, small_table
from tersor.passes.quantize.rtn import RoundToNearest
from tersor.passes.quantize.static import StaticActivations
from tersor.passes.registry import register
from tersor.passes.sites import names

Form = Literal["f32", "bf16", "int8"]
BITS: Mapping[Form, int] = {"f32": 32, "bf16": 16, "int8": 8}

ROUNDS = 8
"""How often a plan is made narrower in its budget before every layer stays as it is."""

MARGIN = 0.95
"""A budget that the finished program exceeds is cut to this fraction of what would have been enough."""


@dataclass(frozen=True)
class _Layers:
    """Layers that share a weight (or a name), and so their form.

    Attributes:
        sites: their names.
        weights: their weights' names.
        errors: by form, the noise that they alone would make at the outputs, as a part of the outputs' power.
        bytes: by form, of the weights.
    """

    sites: tuple[str, ...]
    weights: tuple[str, ...]
    errors: Mapping[Form, float]
    bytes: Mapping[Form, int]

    @property
    def forms(self) -> list[Form]:
        return list(self.errors)


@register("quantize.mixed")
class MixedPrecision(Pass):
    """x W^T  ->  the same product in 8 bits, in bf16 or as it is: each layer as narrow as a budget for all allows.

    Before:  %y = linear(%x, @w, @b);   %z = linear(%y, @v, @c);   ...
    After:   %y = linear(decode(encode(%x)), decode(@w.codes), @b);  %z = linear(bf16(%y), bf16(@v), @c);  ...

    What each layer costs in each form is measured on held-out data with all others left alone (`tersor.analyze`).
    Errors of different layers are taken to add up, and the forms are chosen with the least bytes for an error budget,
    or with the least error for a size budget; exactly, as a knapsack problem (`tersor.passes.quantize.allocation`). A
    program that turns out to miss its error budget on all held-out data gets a tighter plan. The quantizing passes do
    the rest: quantize.rtn (or quantize.gptq), quantize.static (or quantize.dynamic), and quantize.bf16. Tables of
    embeddings are planned for like layers (quantize.embeddings, quantize.bf16).

    Legal where those are. Layers that share a weight get one form.

    Source: Dong et al. 2019 (HAWQ), the budgeted choice of bits by sensitivity; sensitivities are measured here,
    without gradients. Nemhauser and Ullmann 1969, the exact choice.

    Options: min_sqnr_db (signal to noise that the outputs keep, against the program as it comes, in decibels) or
    max_bytes (of all parameters afterwards), exactly one; activations ("static": scales from data, "dynamic": scales
    per token); weights ("rtn", "gptq"); batches (held-out batches that layers are tried on: each costs half a run of
    the program per layer and form).
    """

    min_sqnr_db: float | None = None
    max_bytes: int | None = None
    activations: Literal["static", "dynamic"] = "static"
    weights: Literal["rtn", "gptq"] = "rtn"
    batches: int = 1

    numerics = Lossy()
    stage = "quantize.weights"
    acts_on = ("linear", "embedding")
    calibrated = True

    def problem(self) -> str | None:
        if (self.min_sqnr_db is None) == (self.max_bytes is None):
            return "give one of min_sqnr_db and max_bytes"
        if self.max_bytes is not None and self.max_bytes < 1:
            return f"max_bytes = {self.max_bytes} should be positive"
        return None if self.batches > 0 else f"batches = {self.batches} should be positive"

    def run(self, program: Program, context: Context) -> PassResult:
        result, named = PassResult(), names(program)
        open_to_it = self._plain(program, result, named)
        if not open_to_it:
            return result
        analysis = analyze(
            program, context.calibration, schemes=(self._scheme, "bf16"),
            only=[glob.escape(named[node]) for node in open_to_it], batches=self.batches, cache=context.cache,
        )  # fmt: skip
        layers = self._layers(program, open_to_it, named, analysis, result)
        if not layers:
            return result
        original = program.copy()
        judge = Fidelity(original, context.calibration.held_out)
        budget = self._budget(program, layers)
        for _ in range(ROUNDS):
            plan = self._plan(layers, budget)
            trial = original.copy()
            self._apply(trial, layers, plan, context)
            measured = judge(trial)["sqnr_db"]
            if self.min_sqnr_db is None or measured >= self.min_sqnr_db:
                break
            budget *= MARGIN * 10 ** ((measured - self.min_sqnr_db) / 10)
        else:
            plan = self._plan(layers, 0.0)
            measured = math.inf
        self._apply(program, layers, plan, context)
        self._tell(layers, plan, budget, result)
        result.summary = self._summary(layers, plan, measured, program)
        return result

    @property
    def _scheme(self) -> str:
        """The 8-bit scheme of the analysis."""
        return "int8" if self.activations == "static" else "int8-dynamic"

    # -- places

    def _plain(self, program: Program, result: PassResult, named: Mapping[fx.Node, str]) -> list[fx.Node]:
        """The selected layers and tables whose weights can be narrowed; ``result`` gets the others."""
        found, read_by = [], readers(program)
        for function, layer in self.select(program):
            reason = plain_weight(function, layer, read_by)
            if not isinstance(reason, str) and is_call(layer, "embedding"):
                reason = small_table(layer)
            if isinstance(reason, str):
                result.skip(named[layer], reason)
            else:
                found.append(layer)
        return found

    def _layers(
        self, program: Program, nodes: Sequence[fx.Node], named: Mapping[fx.Node, str], analysis: Analysis,
        result: PassResult,
    ) -> list[_Layers]:  # fmt: skip
        """What is decided together, in the program's order."""
        shared = nx.Graph()
        for node in nodes:
            shared.add_edge(("weight", node.args[1].target), ("site", named[node]))
        order = {("site", named[node]): i for i, node in enumerate(nodes)}
        multiplied = {named[node] for node in nodes if is_call(node, "linear")}
        found = []
        for part in sorted(
            nx.connected_components(shared), key=lambda p: min(order.get(m, len(order)) for m in p)
        ):
            sites = tuple(
                sorted((name for kind, name in part if kind == "site"), key=lambda s: order["site", s])
            )
            weights = tuple(sorted(name for kind, name in part if kind == "weight"))
            rows = [row for row in analysis.sites if row.site in sites]
            if not rows:
                for site in sites:
                    result.skip(site, analysis.skipped.get(site, "no calibration data reaches it"))
                continue
            errors: dict[Form, float] = {"f32": 0.0}
            for form, scheme in (("bf16", "bf16"), ("int8", self._scheme)):
                if all(scheme in row.outcomes for row in rows):
                    errors[form] = sum(10 ** (-row.outcomes[scheme].output_sqnr_db / 10) for row in rows)
            size = {form: sum(self._bytes(program, w, form) for w in weights) for form in errors}
            if "int8" in size and self.activations == "static":
                size["int8"] += 8 * len(multiplied.intersection(sites))  # scale and zero point of the input
            found.append(_Layers(sites, weights, errors, size))
        return found

    @staticmethod
    def _bytes(program: Program, weight: str, form: Form) -> int:
        tensor = program.parameters[weight].tensor
        scales = 4 * tensor.shape[0] if form == "int8" else 0
        return tensor.numel() * BITS[form] // 8 + scales

    # -- the choice

    def _budget(self, program: Program, layers: Sequence[_Layers]) -> float:
        """What the layers together may spend: noise relative to the outputs' power, or bytes."""
        if self.min_sqnr_db is not None:
            return 10 ** (-self.min_sqnr_db / 10)
        others = program.parameters.bytes - sum(part.bytes["f32"] for part in layers)
        budget, least = self.max_bytes - others, sum(min(part.bytes.values()) for part in layers)
        if budget < least:
            raise PipelineError(
                f"no choice of bits makes the program's parameters {self.max_bytes:,} bytes",
                why=f"with every layer as narrow as it gets they are {others + least:,} bytes, {others:,} of them not "
                "in the weights of these layers",
                fix=f"give max_bytes of at least {others + least}",
            )
        return budget

    def _plan(self, layers: Sequence[_Layers], budget: float) -> Allocation:
        by_error = self.min_sqnr_db is not None
        options = [
            [
                Option(part.errors[f], part.bytes[f]) if by_error else Option(part.bytes[f], part.errors[f])
                for f in part.forms
            ]
            for part in layers
        ]
        plan = allocate(options, budget)
        assert plan is not None, "f32 makes no noise, and the budget of bytes is checked"
        return plan

    def _apply(self, program: Program, layers: Sequence[_Layers], plan: Allocation, context: Context) -> None:
        """Narrows the layers as planned, weights before the ranges of activations."""
        chosen: dict[Form, list[str]] = {"f32": [], "bf16": [], "int8": []}
        for part, form in _forms(layers, plan):
            chosen[form] += map(glob.escape, part.sites)
        for pass_ in self._passes(chosen):
            if not pass_.only:
                continue
            statistics = None
            if pass_.calibrated:
                statistics = calibrate(
                    program, pass_.requests(program), context.calibration,
                    seed=context.seed, cache=context.cache, title=f"{self.name}, {pass_.name}",
                )  # fmt: skip
            pass_.run(program, replace(context, statistics=statistics))

    def _passes(self, chosen: Mapping[Form, Sequence[str]]) -> Iterator[Pass]:
        """The passes that make the forms, each with its sites."""
        narrow = tuple(chosen["int8"])
        yield EmbeddingTables(only=narrow)
        yield (RoundToNearest if self.weights == "rtn" else GPTQ)(only=narrow)
        yield (StaticActivations if self.activations == "static" else DynamicActivations)(only=narrow)
        yield BFloat16(only=tuple(chosen["bf16"]))

    # -- what it says

    def _tell(self, layers: Sequence[_Layers], plan: Allocation, budget: float, result: PassResult) -> None:
        for part, form in _forms(layers, plan):
            figures = {f"error_{f}": part.errors[f] for f in part.forms if f != "f32"}
            figures |= {
                "bits": BITS[form],
                "bytes_before": part.bytes["f32"],
                "bytes_after": part.bytes[form],
            }
            say = result.skip if form == "f32" else result.change
            for site in part.sites:
                say(site, f"{form}: {self._why(part, form, budget)}", **figures)

    def _why(self, part: _Layers, form: Form, budget: float) -> str:
        """Why a layer has no narrower form."""
        narrower = [f for f in part.forms if part.bytes[f] < part.bytes[form]]
        if not narrower:
            return "the narrowest" if form == "int8" else "int8 does not apply"
        following = narrower[0]
        if self.min_sqnr_db is not None:
            share = part.errors[following] / budget if budget else math.inf
            return f"{following} would make {100 * share:.3g} % of the noise allowed"
        saved = part.bytes[form] - part.bytes[following]
        return f"{following} saves {human_bytes(saved)}, which others give for less noise"

    def _summary(self, layers: Sequence[_Layers], plan: Allocation, measured: float, program: Program) -> str:
        count = {form: sum(len(p.sites) for p, f in _forms(layers, plan) if f == form) for form in BITS}
        noise = plan.spent if self.min_sqnr_db is not None else plan.lost
        expected = -10 * math.log10(noise) if noise else math.inf
        limit = (
            f"at least {self.min_sqnr_db:g} dB"
            if self.max_bytes is None
            else f"at most {self.max_bytes:,} bytes"
        )
        how = (
            "the best plan"
            if not plan.slack
            else f"as good as any for {100 * (1 - plan.slack):.2f} % of the budget"
        )
        return (
            f"{count['int8']} layers in int8, {count['bf16']} in bf16, {count['f32']} in f32 for {limit}: {how}; "
            f"outputs keep {measured:.1f} dB on held-out data, {expected:.1f} dB expected, in "
            f"{program.parameters.bytes:,} bytes"
        )


def _forms(layers: Sequence[_Layers], plan: Allocation) -> Iterator[tuple[_Layers, Form]]:
    return ((part, part.forms[choice]) for part, choice in zip(layers, plan.choices, strict=True))
