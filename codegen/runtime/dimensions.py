"""Dimension expressions of a manifest, such as ``batch*length + 1``, without tersor.ir, which needs torch.

The text form is the one `str(tersor.ir.dims.Dim)` writes: sums of products of names and integers, ``**`` for
powers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FACTOR = re.compile(
    r"\s*(?:(?P<number>\d{1,18})|(?P<name>[A-Za-z_]\w*))\s*(?:\*\*\s*(?P<power>\d{1,2}))?\s*"
)
_TERM = re.compile(r"\s*([+-]?)([^+-]+)")


@dataclass(frozen=True)
class Expression:
    """A polynomial over named dimensions: ``terms`` are (coefficient, names repeated for powers)."""

    text: str
    terms: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def symbols(self) -> frozenset[str]:
        """Every name that occurs."""
        return frozenset(name for _, names in self.terms for name in names)

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The value with every name replaced; KeyError for a name that has no value."""
        total = 0
        for coefficient, names in self.terms:
            product = coefficient
            for name in names:
                product *= values[name]
            total += product
        return total


def parse(text: str) -> Expression:
    """Read an expression; ValueError when the text is not a polynomial."""
    terms, position = [], 0
    while position < len(text):
        term = _TERM.match(text, position)
        if term is None or (position and not term[1]):
            raise ValueError(f"{text!r} is not a dimension expression")
        coefficient, names = -1 if term[1] == "-" else 1, []
        for part in re.split(r"(?<!\*)\*(?!\*)", term[2]):
            factor = _FACTOR.fullmatch(part)
            if factor is None:
                raise ValueError(f"{text!r} is not a dimension expression")
            power = int(factor["power"] or 1)
            if factor["number"]:
                coefficient *= int(factor["number"]) ** power
            else:
                names += [factor["name"]] * power
        terms.append((coefficient, tuple(names)))
        position = term.end()
    if not terms:
        raise ValueError("an empty text is not a dimension expression")
    return Expression(text, tuple(terms))
