"""One option for each of many places, so that together they lose least within a budget.

This is the multiple-choice knapsack problem. It is solved exactly by keeping, place after place, every sum of options
that no other beats in both what it spends and what it loses (Nemhauser and Ullmann 1969). Layers of a Transformer have
few distinct sizes, so these are few; should there be more than `LIMIT`, they are thinned out, at a price that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIMIT = 1 << 16
"""Sums that are kept after each place."""


@dataclass(frozen=True)
class Option:
    """One way to treat a place: what it takes of the budget, and what it costs otherwise; neither is negative."""

    spent: float
    lost: float


@dataclass(frozen=True)
class Allocation:
    """The chosen options.

    Attributes:
        choices: the index of each place's option.
        spent, lost: their sums; ``spent`` is never above the budget.
        slack: no allocation of at most (1 - slack) * budget loses less; 0 where none of at most the budget does.
    """

    choices: tuple[int, ...]
    spent: float
    lost: float
    slack: float


def allocate(places: Sequence[Sequence[Option]], budget: float, limit: int = LIMIT) -> Allocation | None:
    """Chooses an option for every place, with the least sum of ``lost`` whose sum of ``spent`` is within the budget.

    Returns:
        None where even the least spending is above the budget.
    """
    least = [min(option.spent for option in options) for options in places]
    remaining = np.cumsum([0.0, *least[::-1]])[::-1]  # what the places from i on spend at least
    if remaining[0] > budget:
        return None
    spent, lost = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # by place: the sum each one continues, and its option
    thinned = 0
    for place, options in enumerate(places):
        previous = np.tile(np.arange(len(spent)), len(options))
        option = np.repeat(np.arange(len(options)), len(spent))
        spent = np.concatenate([spent + o.spent for o in options])
        lost = np.concatenate([lost + o.lost for o in options])
        kept = _unbeaten(spent, lost, budget - remaining[place + 1])
        if len(kept) > limit:
            kept, thinned = kept[_best_in_cells(spent[kept], budget, limit)], thinned + 1
        if not len(kept):  # the least spending is the budget, but for the rounding of sums
            return None
        spent, lost = spent[kept], lost[kept]
        trail.append((previous[kept], option[kept]))
    at = len(spent) - 1  # along the sums that are kept, who spends more loses less
    found, choices = (float(spent[at]), float(lost[at])), []
    for previous, option in reversed(trail):
        choices.append(int(option[at]))
        at = previous[at]
    return Allocation(tuple(choices[::-1]), *found, thinned / limit)


def _unbeaten(spent: np.ndarray, lost: np.ndarray, budget: float) -> np.ndarray:
    """Indices of the sums within a budget that no other one beats, in order of spending."""
    order = np.lexsort((lost, spent))
    order = order[spent[order] <= budget]
    best = np.minimum.accumulate(lost[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = best[1:] < best[:-1]
    return order[first]


def _best_in_cells(spent: np.ndarray, budget: float, limit: int) -> np.ndarray:
    """Of unbeaten sums, the last one, which loses least, in each of ``limit`` equal parts of the budget.

    What stands for a sum that goes spends at most budget / limit more. The smallest sum stays: it can always go on.
    """
    cell = np.minimum((spent / budget * limit).astype(np.int64), limit - 1)
    last = np.ones(len(cell), dtype=bool)
    last[:-1] = cell[1:] != cell[:-1]
    last[0] = True
    return np.flatnonzero(last)
