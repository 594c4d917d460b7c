"""Symbolic dimensions: integer polynomials over named dimensions such as ``batch`` and ``length``.

A shape is ``tuple[int | Dim, ...]``. Arithmetic whose result is constant gives back a plain ``int``, so
static programs never meet a ``Dim``. Ranges of the names live in the function's signature, not here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tersor.errors import ProgramError

Monomial = tuple[str, ...]  # sorted names, repeated for powers; () is the constant term
Shape = tuple["int | Dim", ...]


# A factor is a name or a number, perhaps to a power of at most two digits.
_FACTOR = r"(\w+)(?:\s*\*\*\s*([0-9]{1,2})(?!\w))?"
_TERM = rf"{_FACTOR}(?:\s*\*\s*{_FACTOR})*"
_SUM = re.compile(rf"\s*[+-]?\s*{_TERM}(?:\s*[+-]\s*{_TERM})*\s*")


# What no shape needs: a file that multiplies sizes again and again must not keep its reader busy.
HIGHEST_DEGREE, MOST_TERMS = 32, 10_000


class Dim:
    """A non-constant integer polynomial; immutable, hashable, comparable for equality.

    ``Dim.symbol("batch") * Dim.symbol("length") + 1`` prints as ``batch*length + 1``.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, int]):
        self.terms = tuple(sorted((m, c) for m, c in terms.items() if c))

    @staticmethod
    def symbol(name: str) -> Dim:
        """The dimension called ``name`` (a Python identifier)."""
        if not name.isidentifier():
            raise ProgramError(
                f"dimension name {name!r} is not an identifier", fix="use letters, digits and _"
            )
        return Dim({(name,): 1})

    @staticmethod
    def parse(text: str) -> int | Dim:
        """The inverse of ``str``: sums of products of names and integers, with ``**`` for powers.

        Raises:
            ProgramError: the text is not such a sum.
        """
        if not _SUM.fullmatch(text):
            raise ProgramError(f"{text!r} is not a dimension", fix="write it like batch*length + 1")
        total: int | Dim = 0
        for sign, term in re.findall(r"([+-]?)([^+-]+)", re.sub(r"\s", "", text)):
            value: int | Dim = -1 if sign == "-" else 1
            for base, power in re.findall(_FACTOR, term):
                one = int(base) if base.isdecimal() else Dim.symbol(base)
                for _ in range(int(power or 1)):
                    value = value * one
            total = total + value
        return total

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(name for monomial, _ in self.terms for name in monomial)

    @property
    def is_symbol(self) -> bool:
        """True for a bare name such as ``batch``."""
        return len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1

    @property
    def degree(self) -> int:
        """The most factors of a term: 2 for ``batch*length + 1``."""
        return _degree(self.terms)

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """Substitute every name; values may be ints, other Dims or any type with ``+`` and ``*``."""
        total: Any = None
        for monomial, coefficient in self.terms:
            product: Any = None
            for name in monomial:
                product = values[name] if product is None else product * values[name]
            if product is None:
                product = coefficient
            elif coefficient != 1:
                product = product * coefficient
            total = product if total is None else total + product
        return total

    def __add__(self, other: int | Dim) -> int | Dim:
        if not isinstance(other, int | Dim):
            return NotImplemented
        terms = dict(self.terms)
        for monomial, coefficient in _terms(other):
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return _simplify(terms)

    def __mul__(self, other: int | Dim) -> int | Dim:
        if not isinstance(other, int | Dim):
            return NotImplemented
        terms: dict[Monomial, int] = {}
        factors = _terms(other)
        if len(self.terms) * len(factors) > MOST_TERMS or self.degree + _degree(factors) > HIGHEST_DEGREE:
            raise ProgramError(
                f"a size is a polynomial of degree {self.degree + _degree(factors)} over named dimensions",
                why=f"sizes have a degree of at most {HIGHEST_DEGREE} and {MOST_TERMS} terms",
                fix="make the dimensions static",
            )
        for left, a in self.terms:
            for right, b in factors:
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return _simplify(terms)

    def __floordiv__(self, other: int | Dim) -> int | Dim:
        """Exact division; ProgramError when the quotient is not a polynomial with integer coefficients."""
        quotient = self._divide(other)
        if quotient is None:
            raise ProgramError(
                f"({self}) // ({other}) is not exact", why="dimension arithmetic keeps only exact division"
            )
        return quotient

    def divisible(self, other: int | Dim) -> bool:
        """Whether ``self // other`` is exact for all values of the names."""
        return self._divide(other) is not None

    def _divide(self, other: int | Dim) -> int | Dim | None:
        """Polynomial long division by leading terms; None when something is left over."""
        divisor = [(m, c) for m, c in _terms(other) if c]
        if not divisor:
            return None
        names, factor = max(divisor, key=_graded)
        quotient: int | Dim = 0
        rest: int | Dim = self
        while rest != 0:
            monomial, coefficient = max(_terms(rest), key=_graded)
            if coefficient % factor or Counter(names) - Counter(monomial):
                return None
            left = tuple(sorted((Counter(monomial) - Counter(names)).elements()))
            term = _simplify({left: coefficient // factor})
            quotient = quotient + term
            rest = rest - term * other
        return quotient

    def __rfloordiv__(self, other: int) -> int:
        if other == 0:
            return 0
        raise ProgramError(
            f"{other} // ({self}) is not exact", why="dimension arithmetic keeps only exact division"
        )

    def __neg__(self) -> int | Dim:
        return self * -1

    def __sub__(self, other: int | Dim) -> int | Dim:
        return self + (-other)

    def __rsub__(self, other: int | Dim) -> int | Dim:
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __str__(self) -> str:
        def term(monomial: Monomial, coefficient: int) -> str:
            powers = [n if (k := monomial.count(n)) == 1 else f"{n}**{k}" for n in dict.fromkeys(monomial)]
            if abs(coefficient) != 1 or not monomial:
                powers.insert(0, str(abs(coefficient)))
            return "*".join(powers)

        # constants last, as people write them
        ordered = sorted(self.terms, key=lambda item: (not item[0], item))
        text = ""
        for monomial, coefficient in ordered:
            sign = "-" if coefficient < 0 else "+"
            text += (f" {sign} " if text else ("-" if coefficient < 0 else "")) + term(monomial, coefficient)
        return text

    def __repr__(self) -> str:
        return f"Dim({str(self)!r})"


def product(dims: Iterable[int | Dim]) -> int | Dim:
    """The number of elements of a shape."""
    total: int | Dim = 1
    for dim in dims:
        total = total * dim
    return total


def evaluate_shape(shape: Shape, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """A shape with every name replaced by its value."""
    return tuple(d.evaluate(values) if isinstance(d, Dim) else d for d in shape)


def shape_symbols(shape: Shape) -> frozenset[str]:
    """All names that occur in a shape."""
    return frozenset().union(*(d.symbols for d in shape if isinstance(d, Dim)))


def _graded(term: tuple[Monomial, int]) -> tuple[int, Monomial]:
    """Orders monomials by degree, then by fewest of the first names: an order that products respect."""
    monomial, _ = term
    return len(monomial), monomial


def _terms(value: int | Dim) -> tuple[tuple[Monomial, int], ...]:
    return value.terms if isinstance(value, Dim) else (((), value),)


def _degree(terms: Iterable[tuple[Monomial, int]]) -> int:
    return max((len(monomial) for monomial, _ in terms), default=0)


def _simplify(terms: dict[Monomial, int]) -> int | Dim:
    terms = {m: c for m, c in terms.items() if c}
    if not terms:
        return 0
    if max(map(abs, terms.values())) >= 1 << 63:
        raise ProgramError("a size over named dimensions is larger than 64 bits hold")
    if set(terms) == {()}:
        return terms[()]
    return Dim(terms)
