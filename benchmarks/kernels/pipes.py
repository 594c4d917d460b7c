"""How many vector instructions of a kind each ARM core starts in a cycle, by LLVM's models, beside what estimates take.

    python -m benchmarks.kernels.pipes

llvm-mca reads independent instructions of one kind (of smull, smlal2 and sadalp 14 of each, which use each other's
results); the rate is their number by the cycles. The second number is that of `tersor.targets.estimate.PIPES`.
Needs llvm-mca 16 or newer.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict

from benchmarks.kernels.arm import tool
from tersor.targets.estimate import PIPES

ITERATIONS = 500
PRODUCTS = {
    "fmla": "fmla v{0}.4s, v30.4s, v31.s[0]",
    "sdot": "sdot v{0}.4s, v30.16b, v31.4b[0]",
    "usmmla": "usmmla v{0}.4s, v30.16b, v31.16b",
    "bfmmla": "bfmmla v{0}.4s, v30.8h, v31.8h",
}
CHAIN = ("smull v{0}.8h, v30.8b, v31.8b", "smlal2 v{0}.8h, v30.16b, v31.16b", "sadalp v{1}.4s, v{0}.8h")


def main() -> None:
    mca = tool("llvm-mca")
    code = {name: [text.format(i) for i in range(24)] for name, text in PRODUCTS.items()}
    code["smull"] = [text.format(2 * i, 2 * i + 1) for text in CHAIN for i in range(14)]
    print(f"{'core':<14}" + "".join(f"{name:>16}" for name in code))
    for core, pipes in PIPES.items():
        row = f"{core:<14}"
        for name, lines in code.items():
            taken = asdict(pipes)[name]
            found = len(lines) / (3 if name == "smull" else 1) * ITERATIONS / cycles(lines, core, mca)
            row += f"{'':>16}" if taken is None else f"{found:>9.2f} {taken:>6}"
        print(row)


def cycles(lines: list[str], core: str, mca: str) -> int:
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+all", f"-iterations={ITERATIONS}"]
    said = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", said)[1])


if __name__ == "__main__":
    main()
