"""Tables of embeddings in codes."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Program
from tersor.passes.base import PassResult
from tersor.passes.quantize.places import SMALLEST_TABLE, readers, small_table
from tersor.passes.quantize.weights import Rounding
from tersor.passes.registry import register
from tersor.passes.sites import in_words


@register("quantize.embeddings")
class EmbeddingTables(Rounding):
    """T[i]  ->  s[i] C[i] with 8-bit codes C = round(T / s) and a scale per row (or group) of the table T.

    Before:  %y = embedding(%ids, @t)
    After:   %t = dequantize(@t.codes, @t.scale, axis=0);  %y = embedding(%ids, %t)

    The table of words is most of what a small model takes. quantize.integers has the rows looked up in codes, so that
    only those that are read are decoded.

    Legal when the table is a float32 parameter that only embeddings read. One that is tied to an output projection
    stays as it is, unless ``tied`` has the projection read the same codes: quantize.static or quantize.dynamic make an
    integer product of it then. A small one stays as well, as there is little to gain.

    Source: Jacob et al. 2018, per row as in Guan et al. 2019 (Post-Training 4-bit Quantization on Embedding Tables).

    Options: bits, group and clip as of quantize.rtn; smallest (bytes of the smallest table to store in codes);
    tied (whether tables that linear layers read, too, are stored in codes for both).
    """

    smallest: int = SMALLEST_TABLE
    tied: bool = False

    acts_on = ("embedding",)

    def problem(self) -> str | None:
        return "smallest must not be negative" if self.smallest < 0 else super().problem()

    @property
    def beside(self) -> tuple[str, ...]:
        return ("linear",) if self.tied else ()

    def weights(self, program: Program, result: PassResult) -> dict[fx.Node, torch.Tensor]:
        found = super().weights(program, result)
        protected, read_by = self.protected(program), readers(program)
        for embedding in list(found):
            kept = [n for n in read_by[embedding.args[1].target] if n in protected]
            reason = f"{in_words(kept[0])} is to keep it" if kept else small_table(embedding, self.smallest)
            if reason:
                result.skip(embedding, reason)
                del found[embedding]
        return found
