"""Rounding a weight column by column, where later columns make good for the errors of earlier ones.

The output error of a layer with inputs X is ||X (W - V)^T||^2 = tr((W - V) G (W - V)^T), G = X^T X: a quadratic form
that is the same for all rows of W and for all layers that read X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.weights import Coded

SPAN = 512
"""Columns of a symmetric matrix that are multiplied at once, which decides about speed only."""


@dataclass(frozen=True)
class Curvature:
    """The quadratic form, ready for rounding columns one after the other.

    Attributes:
        order: in which the K columns are rounded, int64 [K].
        factor: U, upper triangular with U^T U = H^-1 for columns in that order, float64 [K, K].
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, count: int, damp: float, act_order: bool) -> Curvature | None:
        """From the Gram matrix [K, K] of ``count`` rows; None when that overflowed.

        H = 2 G / count + damp * mean(diagonal) I. Inputs that are 0 in all rows say nothing: they get the mean, and
        neither give nor take errors. Where H is not positive definite to the last digit, it is damped ten times as
        much until it is.
        """
        if not torch.isfinite(gram.sum()):
            return None
        diagonal = gram.diagonal().double() * (2 / count)
        dead = diagonal <= 0
        mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=diagonal.dtype)
        diagonal[dead] = mean
        order = torch.arange(len(gram))
        if act_order:
            order = gram.diagonal().argsort(descending=True, stable=True)
            gram = gram[order][:, order]
        # H = V V^T with V upper triangular gives H^-1 = U^T U, U = V^-1; flipped, that is a Cholesky factor
        flipped = gram.flip(0, 1).double().mul_(2 / count)
        diagonal = diagonal[order].flip(0)
        while True:
            flipped.diagonal().copy_(diagonal + damp * mean)
            lower, failed = torch.linalg.cholesky_ex(flipped)
            if not failed:
                break
            damp *= 10
        del flipped
        identity = torch.eye(len(lower), dtype=lower.dtype)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        return cls(order, inverse.flip(0, 1).contiguous())


def output_errors(weight: torch.Tensor, ways: Iterable[Coded], gram: torch.Tensor) -> list[float]:
    """||X (W - V)^T||^2 / ||X W^T||^2 for the values V of each way to code W, and inputs X of that Gram matrix."""
    power = _output_power(weight.double(), gram)
    lost = (_output_power(weight.double() - way.values().double(), gram) for way in ways)
    return [error / power if power > 0 else 0.0 for error in lost]


def _output_power(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """||X W^T||^2 = tr(W G W^T) in float64, from the blocks of G = X^T X on its diagonal and above it."""
    total = 0.0
    for start in range(0, len(gram), SPAN):
        columns = slice(start, start + SPAN)
        part = weight[:, columns] @ gram[columns, columns]
        part += 2 * (weight[:, :start] @ gram[:start, columns])
        total += float(part.mul_(weight[:, columns]).sum())
    return total


def round_with_feedback(
    weight: torch.Tensor,
    curvature: Curvature,
    grid: Grid,
    fit: Callable[[torch.Tensor, int | None], torch.Tensor],
    *,
    group: int | None = None,
    static_groups: bool = False,
    block: int = 128,
) -> Coded:
    """Codes of a weight [N, K]; each column's error is spread over those that are not rounded yet.

    Column i becomes q, and with e = (w_i - q) / U_ii every later column j loses e U_ij: what makes the sum of the
    columns times X least wrong. The result does not depend on ``block``, the number of columns after which the rest of
    the matrix is brought up to date in one product.

    Args:
        fit: scales (f32) of the rows of a matrix, or of groups of them.
        group: consecutive columns that share a scale; the scale is fitted when the first of them is due, to what they
            have become by then.
        static_groups: fit the scales of groups to the weight as it was, which a rounding order other than the stored
            one needs.

    Source: Frantar et al. 2023 (GPTQ), algorithm 1.
    """
    count, moving = len(curvature.order), group is not None and not static_groups
    scale = fit(weight, group)
    # numpy, as calling torch for each of some thousand columns takes longer than the arithmetic
    order, factor, steps = curvature.order.numpy(), curvature.factor.numpy(), scale.numpy()
    left = (
        weight.double().T[curvature.order].contiguous().numpy()
    )  # [K, N]: a column of the weight is a row of it
    codes = np.empty(left.shape, np.int8)
    for start, end in _spans(count, block, group if moving else count):
        if moving and start % group == 0:
            due = torch.from_numpy(left[start : start + group])
            scale[:, start // group] = fit(due.T.float(), None)
        errors = np.empty_like(left[start:end])
        for i in range(start, end):
            column = left[i] - factor[start:i, i] @ errors[: i - start]
            step = steps if group is None else steps[:, order[i] // group]
            codes[i] = rounded = grid.codes(column.astype(np.float32), step)
            errors[i - start] = (column - rounded.astype(np.float64) * step) / factor[i, i]
        left[end:] -= factor[start:end, end:].T @ errors
    stored = np.empty_like(codes)
    stored[order] = codes
    return Coded(torch.from_numpy(stored.T.copy()), scale)


def _spans(count: int, block: int, group: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns, none in two groups: the columns of a group are up to date when its scale is due."""
    for first in range(0, count, group):
        end = min(first + group, count)
        yield from ((start, min(start + block, end)) for start in range(first, end, block))
