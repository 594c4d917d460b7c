"""Inner loops of products on ARM CPUs, as built, read by llvm-mca: multiplications per cycle, lanes, spills.

    python benchmarks/kernels/arm.py
    python benchmarks/kernels/arm.py --kernel f32 --kernel sdot --listing

Each GEMM is compiled to an object with symbolic rows, a real epilogue, and columns and elements of k that do not
divide the tile; attention with symbolic lengths. The innermost loops are taken from the disassembly, of those the ones
with the most multiplications: "panel" is that of full tiles, "stream" that of few rows, which prefetches. "share" is
the multiplications' share of the instructions. llvm-mca knows pipes and latencies, no caches; its models of in-order
cores (Cortex-A53, A55) are rough. Needs llvm-mca and llvm-objdump, 22 or newer for Cortex-X1 and X2.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ITERATIONS = 200
BY_LANE = re.compile(r"v\d+\.\w+\[\d+\]$")
BRANCH = re.compile(r"(?:b\.\w+|cbn?z|tbn?z|b)\s.*0x([0-9a-f]+)(?: <|$)")


@dataclass(frozen=True)
class Case:
    """A kernel: target, dtype, what is done with the sums, the instructions that multiply and add up.

    peaks: how many of them each core can start in a cycle, None where that says little.
    """

    target: str
    dtype: str
    epilogue: str
    instructions: str
    peaks: dict[str, float | None]


WIDE = {"neoverse-n1": 2, "neoverse-n2": 2, "cortex-x1": 4}
MATRIX = {"neoverse-n2": 2, "cortex-x2": 4}
CASES = {
    "f32": Case("armv8-a", "float32", "gelu", "fmla", {**WIDE, "cortex-a55": 2, "cortex-a53": None}),
    "fp16": Case("armv8.2-dotprod", "float16", "gelu", "fmla", {**WIDE, "cortex-a55": 2}),
    "sdot": Case("armv8.2-dotprod", "uint8", "requantize", "sdot", {**WIDE, "cortex-a55": 1}),
    "usmmla": Case("armv8.6-i8mm", "uint8", "requantize", "usmmla", MATRIX),
    "bfmmla": Case("armv8.6-i8mm", "bfloat16", "gelu", "bfmmla", MATRIX),
    "attention": Case("armv8.2-dotprod", "float32", "softmax", "fmla", {**WIDE, "cortex-a55": 2}),
    "attention fp16": Case("armv8.2-dotprod", "float16", "softmax", "fmla", {**WIDE, "cortex-a55": 2}),
    "attention sdot": Case("armv8.2-dotprod", "uint8", "softmax", "[su]dot", {**WIDE, "cortex-a55": 1}),
    "attention smmla": Case("armv8.6-i8mm", "uint8", "softmax", "[su]mmla", MATRIX),
    "smull": Case("armv8-a", "uint8", "requantize", "smull2?|sadalp", {"cortex-a53": None}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", action="append", choices=list(CASES), help="repeatable; default: all")
    parser.add_argument("--listing", action="store_true", help="print the loops too")
    options = parser.parse_args()
    mca, objdump = tool("llvm-mca"), tool("llvm-objdump")
    version = int(re.search(r"version (\d+)", run([mca, "--version"]))[1])
    print(f"{mca}, LLVM {version}; shapes: rows symbolic, k 387, n 1541")
    print(
        f"{'kernel':>15} {'loop':>6} {'core':>11} {'products':>8} {'a cycle':>7} {'of peak':>7} {'by lane':>7} "
        f"{'spills':>6} {'share':>5}"
    )
    for name in options.kernel or CASES:
        case = CASES[name]
        product = re.compile(rf"(?:{case.instructions})\s")
        for kind, loop in full_tiles(inner_loops(build(case), objdump), product).items():
            count = sum(bool(product.match(line)) for line in loop)
            lanes = sum(bool(product.match(line) and BY_LANE.search(line)) for line in loop)
            spills = sum(bool(re.search(r"\bsp\b", line)) for line in loop)
            for core, peak in case.peaks.items():
                if core in ("cortex-x1", "cortex-x2") and version < 22:
                    continue  # it reads them as other cores
                rate = count / cycles(loop, core, mca)
                of_peak = f"{rate / peak:7.0%}" if peak else f"{'':>7}"
                print(
                    f"{name:>15} {kind:>6} {core:>11} {count:8} {rate:7.2f} {of_peak} {lanes:7} {spills:6} "
                    f"{count / len(loop):5.0%}"
                )
            if options.listing:
                print("\n".join(f"    {line}" for line in loop))


def tool(name: str) -> str:
    """The newest version of an LLVM tool on the path or where Debian puts it."""
    found = [path for v in range(30, 13, -1) if (path := shutil.which(f"{name}-{v}"))]
    found += [str(path) for path in sorted(Path("/usr/lib").glob(f"llvm-*/bin/{name}"), reverse=True)]
    path = next(iter(found), None) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is missing: install LLVM (Debian: apt-get install llvm)")
    return path


def build(case: Case) -> bytes:
    """The kernel's object file."""
    from tersor.codegen.export.functions import plain_kernel
    from tersor.codegen.export.objects import object_code
    from tersor.codegen.kernels.attention import Attention
    from tersor.codegen.kernels.chain import Chain, ChainInput, Const, Step
    from tersor.codegen.kernels.gemm import Gemm
    from tersor.codegen.kernels.inner_product import ACCUMULATORS, stored_words
    from tersor.codegen.tiles import panel_width
    from tersor.ir.dims import Dim
    from tersor.targets import resolve

    target, sums = resolve(case.target), ChainInput("accumulator", ACCUMULATORS[case.dtype])
    if case.epilogue == "softmax":
        length = Dim.symbol("length")
        stored = "uint8" if case.dtype == "uint8" else "float32"
        attention = Attention(
            Dim.symbol("batch"), length, length, 12, 12, 32, 32, 32**-0.5, dtype=stored, products=case.dtype
        )
        return object_code([plain_kernel("kernel", attention.build(target))], target)
    if case.epilogue == "gelu":
        chain = Chain((sums, ChainInput("column")), (Step("add", (0, 1)), Step("gelu_erf", (2,))), (3,))
    else:
        steps = (
            Step("add", (0, 1)),
            Step("mul", (3, 2)),
            Step("round", (4,)),
            Step("add", (5, Const(7.0))),
            Step("saturate", (6,), "uint8"),
        )
        chain = Chain((sums, ChainInput("column", "int32"), ChainInput("column")), steps, (7,))
    words = stored_words(case.dtype, target)
    gemm = Gemm((Dim.symbol("rows"),), 387, 1541, chain, panel_width(target), 1, case.dtype, words)
    return object_code([plain_kernel("kernel", gemm.build(target))], target)


def inner_loops(code: bytes, objdump: str) -> list[list[str]]:
    """The instructions of every innermost loop, without what ends it."""
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        file.write(code)
        file.flush()
        text = run([objdump, "-d", "--no-show-raw-insn", "--mattr=+all", "--section=.text", file.name])
    lines = [
        (int(m[1], 16), m[2].split("//")[0].strip())
        for m in re.finditer(r"^\s*([0-9a-f]+):\s+(.*)$", text, re.M)
    ]
    place = {address: i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, line) in enumerate(lines):
        branch = BRANCH.match(line)
        if branch and int(branch[1], 16) <= address:
            loops.append((place[int(branch[1], 16)], i))
    inner = [(s, e) for s, e in loops if not any(s <= t and u <= e and (s, e) != (t, u) for t, u in loops)]
    return [[line for _, line in lines[start:end]] for start, end in inner]


def full_tiles(loops: list[list[str]], product: re.Pattern) -> dict[str, list[str]]:
    """Of the loops with the most multiplications one that several tiles of a panel run, and one that streams it."""
    counts = [sum(bool(product.match(line)) for line in loop) for loop in loops]
    full = [loop for loop, count in zip(loops, counts, strict=True) if count == max(counts)]
    # LLVM lays some branches out as jumps back, which look like loops: those with little else are the real ones
    full.sort(key=len, reverse=True)
    kinds = {"stream" if any(line.startswith("prfm") for line in loop) else "panel": loop for loop in full}
    return dict(sorted(kinds.items()))


def cycles(loop: list[str], core: str, mca: str) -> float:
    """Of one iteration."""
    body = [re.sub(r"<.*>", "", line) for line in loop if not BRANCH.match(line)]
    text = "loop:\n" + "\n".join(f"\t{line}" for line in body) + "\n\tsubs x9, x9, #1\n\tb.ne loop\n"
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+all", f"-iterations={ITERATIONS}"]
    return int(re.search(r"Total Cycles:\s+(\d+)", run(command, text))[1]) / ITERATIONS


def run(command: list[str], text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
