"""Microseconds and GFLOP/s of the attention kernel, shape by shape, beside torch's.

    python benchmarks/kernels/attention.py --threads 1
    python benchmarks/kernels/attention.py --threads 2 --shape 1x128x12x12x64 --symbolic --mask keys

A shape is batch x length x heads x key/value heads x head size; q, k and v lie in one joined buffer, as they do in a
model. A GFLOP counts the two matrix products only, for causal attention half of them. Each figure is the best of
many calls, so that other work on the machine is not measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

SHAPES = """
1x8x12x12x64 1x16x12x12x64 1x128x12x12x64 1x197x12x12x64 1x384x12x12x64 1x512x12x12x64 8x128x12x12x64
1x8x12x12x32 1x16x12x12x32 1x128x12x12x32 1x512x12x12x32 8x128x12x12x32
1x128x9x3x64 1x1024x9x3x64
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", action="append", metavar="BxTxHxGxD", help="repeatable; default: a table")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--mask", choices=["none", "keys", "full"], default="none", help="boolean, [B,1,1,T] or [B,1,T,T]"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of q, k, v, the products and the result",
    )
    parser.add_argument("--symbolic", action="store_true", help="compile with symbolic batch and length")
    parser.add_argument("--target", default="native")
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on each shape")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read once, when TVM starts its pool
    print(
        f"{options.threads} thread(s), target {options.target}, {options.dtype}, causal {options.causal}, "
        f"mask {options.mask}"
    )
    print(f"{'shape':>18}  {'us':>8}  {'GFLOP/s':>7}  {'torch us':>8}")
    for shape in options.shape or SHAPES.split():
        b, t, h, g, d = map(int, shape.split("x"))
        flops = 4 * b * h * t * t * d / (2 if options.causal else 1)
        ours, torch = measure(b, t, h, g, d, options)
        print(f"{shape:>18}  {ours * 1e6:8.1f}  {flops / ours / 1e9:7.0f}  {torch * 1e6:8.1f}", flush=True)


def measure(b: int, t: int, h: int, g: int, d: int, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds per call of our kernel and of torch's on the same data."""
    import torch
    import tvm

    from tersor.codegen.kernels.attention import Attention
    from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Step
    from tersor.codegen.linker import link
    from tersor.codegen.llvm import llvm_target
    from tersor.ir.dims import Dim
    from tersor.targets import resolve

    torch.set_num_threads(options.threads)
    batch, length = (Dim.symbol("batch"), Dim.symbol("length")) if options.symbolic else (b, t)
    mask = {"none": None, "keys": (batch, 1, 1, length), "full": (batch, 1, length, length)}[options.mask]
    target = resolve(options.target)
    rounded = Chain((ChainInput("accumulator"),), (Step("cast", (0,), "bfloat16"),), (1,))
    kernel = Attention(
        batch, length, length, h, g, d, d, d**-0.5, causal=options.causal, mask=mask, packed="qkv",
        dtype=options.dtype, products=options.dtype, epilogue=PLAIN if options.dtype == "float32" else rounded,
    )  # fmt: skip
    function = kernel.build(target).with_attr("global_symbol", "main")
    compiled = tvm.compile(tvm.IRModule({"main": function}), target=llvm_target(target))
    with tempfile.TemporaryDirectory() as folder:
        # as a library, like an artifact: TVM's in-memory code can be half as fast
        path = f"{folder}/kernel.so"
        compiled.export_library(path, fcompile=link)
        module = tvm.runtime.load_module(path)
    qkv = torch.randn(b, t, (h + 2 * g) * d)
    keep = None if mask is None else torch.ones(b, 1, 1 if options.mask == "keys" else t, t, dtype=torch.bool)
    arguments = [tvm.runtime.tensor(qkv.numpy().astype(options.dtype))]
    arguments += [tvm.runtime.tensor(keep.numpy())] if keep is not None else []
    out, call = tvm.runtime.empty((b, t, h * d), options.dtype), module["main"]
    qkv = qkv.to(getattr(torch, options.dtype))
    q, k, v = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in qkv.split([h * d, g * d, g * d], dim=-1))
    if keep is not None and options.causal:
        keep = keep & torch.ones(t, t, dtype=torch.bool).tril()

    def peer() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, keep, is_causal=options.causal and keep is None, enable_gqa=h != g
        )

    return best(lambda: call(*arguments, out), options.seconds), best(peer, options.seconds / 4)


def best(call, seconds: float) -> float:
    """The shortest of as many calls as fit the time."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest


if __name__ == "__main__":
    main()
