"""What TVM makes of our kernels on their way to LLVM: its passes for CPUs without those that find nothing in them.

TVM's own list is for scheduled programs and GPUs too. Kernels here are loops over buffers, so there are no blocks to
lower and no threads to bind; above all there is nothing for CompactBufferAllocation to make smaller, which would look
at every access of unrolled code for most of the time. The code comes out the same, but for larger frames where a
length of one or two would have let it shrink a buffer.

Source: tvm/s_tir/pipeline.py of TVM 0.27.
"""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx

PACKED = "tersor_packed"
"""Functions that TVM's runtime calls."""

PLAIN = "tersor_plain"
"""Functions of C."""


def _passes(unroll_once: bool) -> list[tvm.transform.Pass]:
    """Up to the point where arguments are packed. unroll_once: loops of one round become their bodies here; LLVM does
    it otherwise, and orders some instructions in another way."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.StmtSimplify(),
        *([s_tir.transform.LowerOpaqueBlock()] if unroll_once else []),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
    ]


def _packed():
    arguments = [
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),  # leaves parallel loops alone; MakePackedAPI wants what it notes
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]
    last = [tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()]
    sequential = tvm.transform.Sequential
    return sequential(_passes(True) + arguments), lambda: sequential(last), sequential


def _plain():
    passes = [*_passes(False), tirx.transform.BF16StorageLegalize()]
    return tvm.transform.Sequential(passes), tirx.transform.LowerIntrin, tvm.transform.Sequential


tirx.register_tir_pipeline(PACKED, _packed)
tirx.register_tir_pipeline(PLAIN, _plain)
