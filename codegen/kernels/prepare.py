"""The left matrix of a product as instructions for signed bytes, or for pairs of rows, read it.

NEON's dot products multiply signed bytes, its matrix products two rows of eight bytes each; see `inner_product`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.inner_product import WEIGHTS
from tersor.codegen.packing import ELEMENTS, OFFSET, Words
from tersor.ir.dims import Shape, product
from tersor.targets import Target


def is_prepared(words: Words | None, dtype: str) -> bool:
    """Whether such weights are multiplied by what `Prepare` makes of a matrix of this dtype, not by that itself."""
    return words is not None and (words.signed or words.elements > ELEMENTS[WEIGHTS[dtype]])


def prepared(lead: Shape, k: int, words: Words, dtype: str) -> TensorSpec:
    """What `Prepare` makes of a matrix [*lead, k]; a pair of rows may lack one."""
    rows, size = product(lead), -(-k // words.elements) * words.elements
    return TensorSpec((rows, size), "int8") if words.signed else TensorSpec((rows + 1, size), dtype)


@dataclass(frozen=True)
class Prepare:
    """A matrix [*lead, k] for weights that are gathered as ``words``, its rows filled up with zeros to whole words.

    For signed words: int8 [rows, size], each uint8 code less `OFFSET`.
    For others: [rows + 1, size], of which ``out[pair][word][i][j] = a[2 * pair + i, elements * word + j]``; the last
    row is repeated where it has no partner.
    """

    lead: Shape
    k: int
    words: Words
    dtype: Literal["uint8", "bfloat16"] = "uint8"

    def name(self) -> str:
        return f"{'signed' if self.words.signed else 'paired'}_{self.k}"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.lead, self.k), self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (prepared(self.lead, self.k, self.words, self.dtype),)

    def build(self, target: Target) -> tirx.PrimFunc:
        with function(self.name()) as (builder, arguments):
            a = arguments.declare("a", self.inputs()[0])
            out = arguments.declare("out", self.outputs()[0])
            a, out = loops.flat(a), loops.flat(out)
            if self.dtype == "bfloat16":  # TVM rewrites operations on it, mere moves included
                a, out = (T.decl_buffer(b.shape, "uint16", data=b.data) for b in (a, out))
            rows = arguments.size(self.lead)
            together = 1 if self.words.signed else 2
            count = (rows + (together - 1)) // together
            loops.rows(count, rows * self.k, lambda i: self._rows(i, together, rows, a, out))
        return builder.get()

    def _rows(self, index: Expr, together: int, rows: Expr | int, a: tirx.Buffer, out: tirx.Buffer) -> None:
        """One row, or a pair of them."""
        size = self.words.elements
        words, rest = divmod(self.k, size)
        start = math.bind(index * (together * size * (words + (rest > 0))))
        sources = [math.bind(tirx.min(index * together + i, rows - 1) * self.k) for i in range(together)]

        def move(word: Expr | int, where: Expr | None) -> None:
            for i, source in enumerate(sources):
                codes = loops.load(a, source + word * size, size, where)
                if self.words.signed:
                    codes = tirx.Cast(f"int8x{size}", codes ^ tirx.const(OFFSET, f"uint8x{size}"))
                loops.store(out, start + (word * together + i) * size, codes, size)

        if words:
            with T.serial(words) as word:
                move(word, None)
        if rest:
            move(words, loops.mask(rest, size))
