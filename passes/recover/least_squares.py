"""Weights and biases fitted anew behind what lossy passes changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.block import blocks
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.calibration import Pieces, Step, sequential
from tersor.passes.calibration.requests import Split
from tersor.passes.context import Context
from tersor.passes.quantize.places import bias_of, plain_weight, readers
from tersor.passes.recover.reference import correctable, counterparts
from tersor.passes.registry import register

SPARSE = 0.1
"""A weight of which this part is 0 is sparse on purpose; a single 0 in a dense one may become something else."""

PATTERNS = 16
"""Up to so many different patterns of zeros in its rows, a weight is solved for exactly."""

STEPS = 100
"""Of conjugate gradients, where there are more patterns; the error falls in each."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""What "auto" tries: with some ten tokens for each input little is best, with fewer much."""

EXACT = 1e-6
"""Up to this fraction of what is added up, sums are those of rounding errors."""

GAIN = 0.99
"""A layer changes where its error on held-out data falls at least to this fraction."""


@register("recover.least_squares")
class LeastSquares(Pass):
    """x' W^T + b  ->  x' V^T + c: the layer's outputs are as near as they get to what they were before lossy passes.

    Before:  %y = linear(%x, @w, @b)
    After:   %y = linear(%x, @v, @c)       V, c = argmin ||Y - X V^T - c||^2 + ridge * t ||V - W||^2

    X are the layer's inputs as they are now, with everything before it removed, factorized or made sparse and
    corrected; Y are its outputs before that; t = tr(X^T X) / K. Patterns of zeros stay: columns of V are 0 where those
    of W are, and in a sparse W every weight that is 0. Each token counts by 1 / |y|^2, so that errors are relative
    ones, as in recover.bias. Layers are fitted in order, block by block, and changed only where that lowers the error
    on held-out data. A layer without a bias gets none.

    Belongs behind each pass that removes structure, and before any that rounds: fitted weights are on no grid. Legal
    when the weight is a float32 parameter of no other layer of ``main`` and read by linear layers only, the bias a
    parameter or absent, and the layer was there before the lossy passes, under the same name, with outputs of the same
    shape, in the same order of blocks.

    Source: Frantar & Alistarh 2022 (Optimal Brain Compression), the layer-wise objective; Kwon et al. 2022, least
    squares against the uncompressed model's outputs; the ridge towards the weights as they are.

    Options: ridge ("auto": that of `RIDGES` with the least held-out error).
    """

    ridge: float | Literal["auto"] = "auto"

    numerics = Lossy()
    acts_on = ("linear",)
    forbids = {"quantized"}
    calibrated = True
    recovers = True

    def problem(self) -> str | None:
        return None if self.ridge == "auto" or self.ridge > 0 else f"ridge = {self.ridge} should be positive"

    def run(self, program: Program, context: Context) -> PassResult:
        result, reference, data = PassResult(), context.reference, context.calibration
        before = counterparts(program, reference, "linear")
        read_by = readers(program)

        def obstacle(function: Function, linear: fx.Node) -> str | None:
            weight = plain_weight(function, linear, read_by)
            if isinstance(weight, str):
                return weight
            here = [n for n in read_by[linear.args[1].target] if n.graph is function.graph]
            return None if len(here) == 1 else "its weight is shared with other layers"

        places = correctable(self, program, before, obstacle, lambda n: str(n.args[1].target), result)
        if not places:
            return result
        runs = {
            split: (
                sequential(
                    program, data, split=split, seed=context.seed,
                    title=f"{self.name}, block by block" if split == "fit" else None,
                ),
                _Teacher(reference, sequential(reference, data, split=split, seed=context.seed, title=None)),
            )
            for split in _SPLITS
        }  # fmt: skip
        pieces, then = Pieces(self, context), reference.main.value_digests()
        for now in zip(*(steps for steps, _ in runs.values()), strict=True):
            lots: dict[fx.Node, list[fx.Node]] = {}
            for linear in now[0].calls("linear"):
                if linear in places:
                    lots.setdefault(linear.args[0], []).append(linear)
            for linears in lots.values():
                digests = program.main.value_digests()
                keys = {n: (digests[n], then[before[n]]) for n in linears}
                fits = {n: fit for n in linears if (fit := _Fit.kept(pieces, keys[n])) is not None}
                pairs = {n: before[n] for n in linears if n not in fits}
                if pairs:
                    moments = [
                        teacher.moments(step, pairs)
                        for step, (_, teacher) in zip(now, runs.values(), strict=True)
                    ]
                    fits |= {n: self._fit(program, n, *(found[n] for found in moments)) for n in pairs}
                for linear in linears:
                    if linear in pairs and isinstance(fits[linear], _Fit):
                        fits[linear].keep(pieces, keys[linear])
                    self._write(program, linear, places[linear], fits[linear], result)
        return result

    def _fit(
        self, program: Program, linear: fx.Node, fit: _Moments | str, held_out: _Moments | str
    ) -> _Fit | str:
        """The best of a layer's fits, or why there is none."""
        for moments in (fit, held_out):
            if isinstance(moments, str):
                return moments
        bias = bias_of(linear)
        weight = program.parameters[linear.args[1].target].tensor.double()
        start = None if bias is None else program.parameters[bias.target].tensor.double()
        ridges = RIDGES if self.ridge == "auto" else (self.ridge,)
        candidates = [fit.solution(weight, start is not None, ridge) for ridge in ridges]
        errors = [held_out.error(*candidate) for candidate in candidates]
        best = errors.index(min(errors))
        figures = {
            "error_before": held_out.error(weight, start),
            "error_after": errors[best],
            "ridge": ridges[best],
            "tokens_per_input": fit.count / weight.shape[1],
        }
        new, shift = candidates[best]
        return _Fit(new.float(), None if shift is None else shift.float(), figures)

    def _write(
        self, program: Program, linear: fx.Node, others: list[fx.Node], fit: _Fit | str, result: PassResult
    ) -> None:
        """Gives a layer, and those of other functions that share its parameters, its fit where that helps."""
        if isinstance(fit, str):
            result.skip(linear, fit)
        elif fit.figures["error_before"] <= EXACT:
            result.skip(linear, "its outputs are what they were", **fit.figures)
        elif not fit.figures["error_after"] <= GAIN * fit.figures["error_before"]:
            result.skip(linear, "its outputs would not be nearer on held-out data", **fit.figures)
        else:
            result.change(linear, "fitted to its outputs before", **fit.figures)
            program.parameters[linear.args[1].target] = fit.weight
            if fit.bias is not None:
                self._move_bias(program, (linear, *others), bias_of(linear).target, fit.bias)

    def _move_bias(
        self, program: Program, layers: tuple[fx.Node, ...], name: str, value: torch.Tensor
    ) -> None:
        """Gives layers another bias; who else reads the old one keeps it."""
        if set(readers(program)[name]) <= set(layers):
            program.parameters[name] = value
            return
        functions = {function.graph: function for function in program.functions.values()}
        new = program.parameters.add(name, value)
        for layer in layers:
            build = functions[layer.graph].builder(before=layer, made_by=self.name)
            layer.args = (*layer.args[:2], build.read(new))


_SPLITS: tuple[Split, Split] = ("fit", "held_out")

_UNREACHED = "no calibration data reaches it"


@dataclass(frozen=True)
class _Fit:
    """A layer's new weight f32 [N, K], bias f32 [N] where it has one, and what was measured."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    figures: dict[str, float]

    @classmethod
    def kept(cls, pieces: Pieces, values: tuple[str, str]) -> _Fit | None:
        """What an earlier run found for a layer as it is now and as it was; None when none came so far."""
        if (found := pieces.load(*values)) is None:
            return None
        tensors, figures = found
        return cls(tensors["weight"], tensors.get("bias"), figures)

    def keep(self, pieces: Pieces, values: tuple[str, str]) -> None:
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        pieces.store(values, tensors, self.figures)


class _Teacher:
    """The reference, run block by block as far as the program is."""

    def __init__(self, reference: Program, steps: Iterator[Step]):
        self._steps = steps
        self._place = {n: i for i, block in enumerate(blocks(reference.main)) for n in block.nodes}
        self._step: Step | None = None

    def moments(self, step: Step, pairs: dict[fx.Node, fx.Node]) -> dict[fx.Node, _Moments | str]:
        """Moments of the inputs that layers have in ``step`` and of the outputs of their counterparts.

        Where there are none, why: the counterpart stands elsewhere, or no token reaches the layer.
        """
        first = min(self._place[node] for node in pairs.values())
        while self._step is None or self._step.index < first:
            self._step = next(self._steps)
        found: dict[fx.Node, _Moments | str] = {
            layer: _UNREACHED
            if self._place[node] == self._step.index
            else "its blocks are in another order now"
            for layer, node in pairs.items()
        }
        here = {layer: node for layer, node in pairs.items() if self._place[node] == self._step.index}
        inputs = {layer.args[0] for layer in here}
        for now, then in zip(step.rows(inputs), self._step.rows(here.values()), strict=True):
            for layer, node in here.items():
                x, y = now[layer.args[0]], then[node]
                if len(x) != len(y):
                    found[layer] = "its tokens are others now"
                elif len(x) and not (isinstance(found[layer], str) and found[layer] != _UNREACHED):
                    if isinstance(found[layer], str):
                        found[layer] = _Moments.none(x.shape[1], y.shape[1])
                    found[layer].add(x, y)
        return found


@dataclass
class _Moments:
    """Sums over tokens with inputs x [K] and outputs y [N] that count by a = 1 / |y|^2, in float64.

    Attributes:
        count: tokens.
        weights, power: sums of a (float) and of a |y|^2.
        x, y: of a x [K], a y [N].
        gram, cross: of a x^T x [K, K], a y^T x [N, K].
    """

    count: int
    weights: float
    power: float
    x: torch.Tensor
    y: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def none(cls, inputs: int, outputs: int) -> _Moments:
        shapes = ((inputs,), (outputs,), (inputs, inputs), (outputs, inputs))
        return cls(0, 0.0, 0.0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Takes in tokens x [n, K] and y [n, N]; products are formed in float32, sums in float64."""
        power = y.double().square().sum(1, keepdim=True)
        root = power.clamp(min=max(1e-6 * power.mean().item(), 1e-30)).rsqrt()
        self.count += len(x)
        self.weights += root.square().sum().item()
        self.power += (power * root.square()).sum().item()
        x, y = x.double() * root, y.double() * root
        self.x += (x * root).sum(0)
        self.y += (y * root).sum(0)
        x, y = x.float(), y.float()
        self.gram += x.T @ x
        self.cross += y.T @ x

    def solution(
        self, weight: torch.Tensor, bias: bool, ridge: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The best weight [N, K] with the pattern of this one, and bias [N] where there is one; float64."""
        gram, cross = self.gram, self.cross
        if bias:  # of the best bias for any weight
            gram = gram - self.x[:, None] * self.x / self.weights
            cross = cross - self.y[:, None] * self.x / self.weights
        # inputs that hardly vary leave nothing but the rounding of sums in the matrix
        damp = ridge * gram.diagonal().mean().item() + EXACT * self.gram.diagonal().mean().item()
        new = None if damp > 0 else weight
        while new is None:
            left = gram + damp * torch.eye(len(gram), dtype=gram.dtype)
            new = _solved(left, cross + damp * weight, weight, _pattern(weight))
            damp *= 10
        return new, (self.y - new @ self.x) / self.weights if bias else None

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        """|y - W x - b|^2 / |y|^2, the mean over the tokens."""
        lost = self.power + ((weight @ self.gram - 2 * self.cross) * weight).sum()
        if bias is not None:
            lost = lost + 2 * bias @ (weight @ self.x - self.y) + self.weights * bias.square().sum()
        return max(lost.item(), 0.0) / self.count


def _pattern(weight: torch.Tensor) -> torch.Tensor:
    """Which weights [N, K] may be other than 0."""
    filled = weight != 0
    live = filled.any(0)
    dense = filled[:, live].double().mean() > 1 - SPARSE
    return live.expand_as(weight) if dense else filled


def _solved(
    left: torch.Tensor, right: torch.Tensor, start: torch.Tensor, pattern: torch.Tensor
) -> torch.Tensor | None:
    """V [N, K] of this pattern that is nearest to V left = right, in the norm of the positive definite ``left``.

    None where that is not quite positive definite.
    """
    patterns, row_of = pattern.unique(dim=0, return_inverse=True)
    if len(patterns) > PATTERNS:
        return _conjugate_gradients(left, right, start, pattern)
    new = torch.zeros_like(start)
    for i, kept in enumerate(patterns):
        columns, rows = kept.nonzero()[:, 0], (row_of == i).nonzero()
        if len(columns):
            factor, failed = torch.linalg.cholesky_ex(left[columns][:, columns])
            if failed:
                return None
            new[rows, columns] = torch.cholesky_solve(right[rows, columns].T, factor).T
    return new


def _conjugate_gradients(
    left: torch.Tensor, right: torch.Tensor, start: torch.Tensor, pattern: torch.Tensor
) -> torch.Tensor:
    """The same for rows that have patterns of their own, in `STEPS` steps from ``start``, scaled by the diagonal."""
    scale = left.diagonal().sqrt()
    left, found = left / scale / scale[:, None], start * scale * pattern
    rest = (right / scale - found @ left) * pattern
    direction, power = rest, rest.square().sum(1, keepdim=True)
    enough = 1e-20 * power
    for _ in range(STEPS):
        if (power <= enough).all():
            break
        image = (direction @ left) * pattern
        length = power / (direction * image).sum(1, keepdim=True).clamp(min=1e-300)
        found, rest = found + length * direction, rest - length * image
        before, power = power, rest.square().sum(1, keepdim=True)
        direction = rest + power / before.clamp(min=1e-300) * direction
    return found / scale
