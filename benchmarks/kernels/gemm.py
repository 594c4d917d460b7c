"""Billions of operations per second of the packed GEMM, shape by shape, beside this machine's peak for the dtype.

    python benchmarks/kernels/gemm.py --threads 1
    python benchmarks/kernels/gemm.py --dtype uint8 --epilogue gelu --shape 128x768x3072 --symbolic

Each shape walks over so many copies of its weights that they exceed the last-level cache, several times (``--warm``:
a single copy). A copy counts with its best time; the figure is the mean over the copies. The peak is that of a loop
over operands in registers, times the number of threads; operations are multiplications and additions. With
``--dtype uint8`` results are requantized to codes, with bfloat16 rounded to it, but for the epilogues "none" and
"residual", which leave f32.
"""

from __future__ import annotations

import argparse
import os

import numpy as np

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
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "uint8"], default="float32", help="of the activations"
    )
    parser.add_argument("--warm", action="store_true", help="the weights stay in cache where they fit")
    parser.add_argument("--symbolic", action="store_true", help="compile with a symbolic number of rows")
    parser.add_argument("--target", default="native")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each shape")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cpus)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read once, when TVM starts its pool
    limit = options.threads * peak(options.dtype, options.target)
    print(
        f"{options.threads} thread(s), target {options.target}, {options.dtype}, epilogue {options.epilogue}, "
        f"{'warm' if options.warm else 'cold'} weights; peak {limit:.0f} GOP/s"
    )
    element = {"float32": 4, "bfloat16": 2, "uint8": 1}[options.dtype]
    for shape in options.shape or SHAPES.split():
        m, k, n = map(int, shape.split("x"))
        seconds = measure(m, k, n, options)
        rate, weights = 2e-9 * m * k * n / seconds, 1e-9 * element * k * n / seconds
        print(
            f"{shape:>16}  {rate:6.0f} GOP/s  {rate / limit:6.1%} of the peak  {weights:5.1f} GB/s of weights",
            flush=True,
        )


def epilogue(dtype: str, name: str):
    """The chain of this name for accumulators of a GEMM over this dtype."""
    from tersor.codegen.kernels.chain import Chain, ChainInput, Const, Step

    integer = dtype == "uint8"
    inputs = [ChainInput("accumulator", "int32" if integer else "float32")]
    steps: list[Step] = []
    value = 0
    operands: list[tuple[str, str, str]] = []  # operation, kind and dtype of its second operand
    if integer:
        operands += [("add", "column", "int32"), ("mul", "column", "float32")]
    operands += [("add", "column", "float32")] if name == "gelu" or name != "none" and not integer else []
    inputs += [ChainInput(kind, type_) for _, kind, type_ in operands]
    inputs += [ChainInput("full")] if name == "residual" else []

    def push(step: Step) -> int:
        steps.append(step)
        return len(inputs) + len(steps) - 1

    for i, (operation, _, _) in enumerate(operands):
        value = push(Step(operation, (value, i + 1)))
    if name == "gelu":
        value = push(Step("gelu_erf", (value,)))
    if name == "residual":
        value = push(Step("add", (value, len(inputs) - 1)))
    if integer and name in ("bias", "gelu"):
        value = push(Step("round", (value,)))
        value = push(Step("add", (value, Const(128.0))))
        value = push(Step("saturate", (value,), "uint8"))
    if dtype == "bfloat16" and name in ("bias", "gelu"):
        value = push(Step("cast", (value,), "bfloat16"))
    return Chain(tuple(inputs), tuple(steps), (value,))


def measure(m: int, k: int, n: int, options: argparse.Namespace) -> float:
    """Seconds per call."""
    from tersor.codegen.kernels.gemm import Gemm
    from tersor.codegen.llvm import compile_function
    from tersor.codegen.tiles import panel_width
    from tersor.codegen.tuning import seconds_per_call
    from tersor.ir.dims import Dim
    from tersor.targets import resolve

    target = resolve(options.target)
    lead = (Dim.symbol("rows"),) if options.symbolic else (m,)
    chain = epilogue(options.dtype, options.epilogue)
    kernel = Gemm(lead, k, n, chain, panel_width(target), dtype=options.dtype)
    call = compile_function(kernel.build(target), target)["main"]
    return seconds_per_call(call, kernel, {"rows": m}, options.seconds, 0 if options.warm else COLD_BYTES)


def peak(dtype: str, target_name: str = "native") -> float:
    """GOP/s of one thread in a register tile whose operands stay in L1."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    from tersor.codegen.kernels.inner_product import inner_product
    from tersor.codegen.kernels.register_tile import RegisterTile
    from tersor.codegen.llvm import compile_function
    from tersor.codegen.tiles import PANEL_VECTORS, choose
    from tersor.codegen.timing import seconds_per_call
    from tersor.targets import resolve

    target, rounds, words = resolve(target_name), 2000, 64
    product = inner_product(dtype, target)
    rows, width = choose(target, 1, product).rows, PANEL_VECTORS * product.lanes

    def vector(v: int):
        return T.ramp(v * product.lanes, 1, product.lanes)

    specs = [
        ((rows, words * product.factor), product.left),
        ((words, width), "float32" if product.factor == 1 else "int32"),
        ((rows, width), product.accumulator),
    ]
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("peak")
            T.func_attr({"tirx.noalias": True})
            left, right, out = (T.arg(f"x{i}", T.buffer(*spec)) for i, spec in enumerate(specs))
            left = product.matrix(left)
            with product.body():
                tile = RegisterTile(rows, PANEL_VECTORS, product)
                with T.serial(rounds):
                    tile.accumulate(
                        0,
                        words,
                        lambda r, k, n: product.word(left, r, k, n),
                        lambda v, k: right[k, vector(v)],
                    )
                for r in range(rows):
                    for v in range(PANEL_VECTORS):
                        T.buffer_store(out, tile.vector(r, v), [r, vector(v)])
    call = compile_function(builder.get(), target)["main"]
    arguments = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in specs]
    operations = 2 * rounds * words * product.factor * rows * width
    return 1e-9 * operations / seconds_per_call(call, [arguments], 0.2)


if __name__ == "__main__":
    main()
