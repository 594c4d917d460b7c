"""torch's symbolic sizes (SymInts over sympy expressions) as our named dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min

from tersor.errors import CaptureError, ProgramError
from tersor.ir import Dim, Range, Value
from tersor.ir.canonicalize.affine import lower_bound
from tersor.ir.value import DTYPE_NAMES


class Symbols:
    """Translates SymInts, given the dimension name of each sympy symbol and the dimensions' ranges."""

    def __init__(self, names: Mapping[sympy.Symbol, str], ranges: Mapping[str, Range]):
        self.names, self.ranges = dict(names), ranges

    def dim(self, size: Any) -> int | Dim:
        """The dimension that an int or SymInt stands for.

        Raises:
            CaptureError: it is not a polynomial over the named dimensions.
        """
        if isinstance(size, bool | int):
            return int(size)
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        try:
            return self._convert(sympy.sympify(expression))
        except ProgramError as error:
            raise CaptureError(
                f"a size of the model, {self.show(expression)}, is not a polynomial over its dynamic dimensions",
                why=error.what,
                fix="make the dimension static, or choose sizes for which the model needs no rounding",
            ) from error

    def shape(self, sizes: Any) -> tuple[int | Dim, ...]:
        return tuple(self.dim(s) for s in sizes)

    def value(self, tensor: torch.Tensor) -> Value:
        """Dtype and shape of a (fake) tensor.

        Raises:
            CaptureError: the dtype has no name in the program.
        """
        if tensor.dtype not in DTYPE_NAMES:
            raise CaptureError(f"the model computes in {tensor.dtype}", why="the dialect has no such type")
        return Value(DTYPE_NAMES[tensor.dtype], self.shape(tensor.shape))

    def show(self, expression: Any) -> str:
        """An expression with the names in place of torch's symbols."""
        text = str(expression)
        for symbol, name in self.names.items():
            text = text.replace(str(symbol), name)
        return text

    def _convert(self, e: sympy.Expr) -> int | Dim:
        if e.is_Integer:
            return int(e)
        if e.is_Symbol:
            if e not in self.names:
                raise ProgramError(f"{e} depends on the values of tensors")
            return Dim.symbol(self.names[e])
        if isinstance(e, sympy.Add):
            return sum((self._convert(a) for a in e.args), start=0)
        if isinstance(e, sympy.Mul):
            product: int | Dim = 1
            for argument in e.args:
                product = product * self._convert(argument)
            return product
        if isinstance(e, sympy.Pow) and e.exp.is_Integer and e.exp > 0:
            return self._convert(e.base ** (e.exp - 1)) * self._convert(e.base)
        if isinstance(e, FloorDiv):
            numerator, denominator = map(self._convert, e.args)
            if isinstance(numerator, int) and isinstance(denominator, Dim):
                raise ProgramError(f"{numerator} // ({denominator}) is not exact")
            return numerator // denominator
        if isinstance(e, Max | Min):
            return self._extreme(e)
        raise ProgramError(f"{self.show(e)} has a form that dimensions do not have")

    def _extreme(self, e: sympy.Expr) -> int | Dim:
        """The operand that is largest or smallest at all sizes."""
        operands, sign = [self._convert(a) for a in e.args], 1 if isinstance(e, Max) else -1
        for candidate in operands:
            if all(lower_bound(sign * (candidate - other), self.ranges) >= 0 for other in operands):
                return candidate
        raise ProgramError(f"which operand of {self.show(e)} it is depends on the sizes")
