"""What compiling and loading a model cost: time, memory and bytes, each step in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.models import MODELS

COMPILE = """
import json, resource, sys, time
import tersor
from benchmarks.models import MODELS
model, path = MODELS[sys.argv[1]], sys.argv[2]
batch, length = map(int, sys.argv[3].split("x"))
torch_model, example = model.build(), model.inputs(batch, length)
start = time.perf_counter()
tersor.compile(torch_model, example, output=path)
seconds = time.perf_counter() - start
weights = {p.data_ptr(): p.nbytes for p in torch_model.parameters()}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(seconds=seconds, peak=peak, weights=sum(weights.values()))))
"""

RUN = """
import json, sys, time
start = time.perf_counter()
import tersor
imported = time.perf_counter()
model = tersor.load(sys.argv[1], threads=1)
loaded = time.perf_counter()
model.benchmark(calls=1)
foreign = [name for name in ("torch", "tvm", "transformers") if name in sys.modules]
libraries = {line.split("/")[-1].strip() for line in open("/proc/self/maps")}
foreign += [name for name in libraries if "libtvm_compiler" in name or "libtorch" in name]
print(json.dumps(dict(imports=imported - start, load=loaded - imported, foreign=foreign)))
"""


def main() -> None:
    """Print what each step took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="bert-base")
    parser.add_argument("--shape", default="1x128", help="BATCHxLENGTH")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder, "model.tersor")
        made = step(COMPILE, options.model, str(artifact), options.shape)
        size = sum(file.stat().st_size for file in artifact.iterdir())
        runs = [step(RUN, str(artifact)) for _ in range(3)]
    print(f"{options.model} {options.shape}")
    print(f"capture to saved artifact: {made['seconds']:.1f} s, peak memory {made['peak'] / 1e9:.2f} GB")
    print(f"artifact: {size / 1e6:.1f} MB, {size / made['weights']:.4f} of the f32 weights")
    print(f"import tersor: {min(r['imports'] for r in runs):.2f} s")
    print(
        f"load: {min(r['load'] for r in runs):.2f} s (of {len(runs)}: {[round(r['load'], 2) for r in runs]})"
    )
    print(
        f"torch or compiler loaded where it runs: {sorted({n for r in runs for n in r['foreign']}) or 'no'}"
    )


def step(code: str, *arguments: str) -> dict:
    """The JSON that a fresh Python process prints last."""
    output = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
