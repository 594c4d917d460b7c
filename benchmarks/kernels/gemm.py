"""GFLOP/s of the packed f32 GEMM, shape by shape, with weights that are not in cache.

    python benchmarks/kernels/gemm.py --threads 1
    python benchmarks/kernels/gemm.py --threads 2 --shape 128x768x3072 --epilogue gelu --symbolic

Each shape walks over so many copies of its weights that they exceed the last-level cache, several times.
A copy counts with its best time; the figure is the mean over the copies.
"""

from __future__ import annotations

import argparse
import os

SHAPES = """
128x768x2304 128x768x768 128x768x3072 128x3072x768
197x768x2304 197x768x768 197x768x3072 197x3072x768
1024x768x2304 1024x768x768 1024x768x3072 1024x3072x768
384x768x3072 384x3072x768 16x768x3072 16x3072x768
1x768x3072 4x768x768 8x384x1536 8x1536x384 16x384x384 16x384x1536 16x1536x384
128x384x384 128x384x1152 128x384x1536 128x1536x384
512x384x384 512x384x1536 512x1536x384 1024x384x384 1024x384x1536 1024x1536x384
128x768x50257 1x768x50257
"""
COLD_BYTES = 128e6
"""Bytes of weights in one pass."""


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", action="append", metavar="MxKxN", help="repeatable; default: all below")
    parser.add_argument("--epilogue", choices=["none", "bias", "gelu", "residual"], default="bias")
    parser.add_argument("--symbolic", action="store_true", help="compile with a symbolic number of rows")
    parser.add_argument("--target", default="native")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each shape")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cpus)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read once, when TVM starts its pool
    print(f"{options.threads} thread(s), target {options.target}, epilogue {options.epilogue}")
    for shape in options.shape or SHAPES.split():
        m, k, n = map(int, shape.split("x"))
        seconds = measure(m, k, n, options)
        flops, bytes_ = 2e-9 * m * k * n / seconds, 4e-9 * k * n / seconds
        print(f"{shape:>16}  {flops:6.0f} GFLOP/s  {bytes_:5.1f} GB/s of weights", flush=True)


def measure(m: int, k: int, n: int, options: argparse.Namespace) -> float:
    """Seconds per call."""
    from tersor.codegen.kernels.chain import Chain, ChainInput, Step
    from tersor.codegen.kernels.gemm import Gemm
    from tersor.codegen.llvm import compile_function
    from tersor.codegen.tiles import panel_width
    from tersor.codegen.tuning import seconds_per_call
    from tersor.ir.dims import Dim
    from tersor.targets import resolve

    accumulator, column, full = ChainInput("accumulator"), ChainInput("column"), ChainInput("full")
    chains = {
        "none": Chain((accumulator,), (), (0,)),
        "bias": Chain((accumulator, column), (Step("add", (0, 1)),), (2,)),
        "gelu": Chain((accumulator, column), (Step("add", (0, 1)), Step("gelu_erf", (2,))), (3,)),
        "residual": Chain((accumulator, column, full), (Step("add", (0, 1)), Step("add", (3, 2))), (4,)),
    }
    target = resolve(options.target)
    lead = (Dim.symbol("rows"),) if options.symbolic else (m,)
    kernel = Gemm(lead, k, n, chains[options.epilogue], panel_width(target))
    call = compile_function(kernel.build(target), target)["main"]
    return seconds_per_call(call, kernel, {"rows": m}, options.seconds, COLD_BYTES)


if __name__ == "__main__":
    main()
