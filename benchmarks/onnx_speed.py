"""Speed carries over: a model captured from the ONNX file that torch.onnx.export writes, beside one captured from torch.

Says first whether both captures are the same program and give the same artifact, which leaves nothing to measure; then
both artifacts run in this process, bound to one CPU, in turns whose order alternates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

import tersor
from benchmarks.models import MODELS
from benchmarks.turns import take_turns
from tersor.codegen.runtime.folder import read_manifest
from tersor.ir import diff
from tersor.peers.engines import onnx_file


def main() -> None:
    """Print what the captures share, the largest difference of the outputs, and the ratio of the latencies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_speed", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="bert-base")
    parser.add_argument("--length", type=int, default=128, help="of the text, in tokens")
    parser.add_argument("--rounds", type=int, default=10, help="turns of three timed calls for each")
    options = parser.parse_args()
    model = MODELS[options.model]
    inputs = model.inputs(1, options.length)
    fixed = {
        name: {axis: (dim, size, size) for axis, dim in axes.items() for size in (inputs[name].shape[axis],)}
        for name, axes in model.dynamic_axes.items()
    }
    captured = {
        "torch": tersor.capture(model.build(), inputs),
        "onnx": tersor.capture(onnx_file(model, inputs), inputs, dynamic=fixed),
    }
    print(f"{options.model}, {model.label(1, options.length)}, 1 thread")
    same = captured["torch"].digest() == captured["onnx"].digest()
    print("programs:", "the same" if same else f"they differ\n{diff(captured['torch'], captured['onnx'])}")
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder, f"{name}.tersor") for name in captured}
        compiled = {
            name: tersor.compile(program, output=places[name], threads=1)
            for name, program in captured.items()
        }
        hashes = {
            name: {file: record.sha256 for file, record in read_manifest(place).files.items()}
            for name, place in places.items()
        }
        for file in hashes["torch"]:
            equal = hashes["torch"][file] == hashes["onnx"][file]
            print(f"{file}: {'equal, byte for byte' if equal else 'differs'}")
        outputs = {name: dict(model(**inputs)) for name, model in compiled.items()}
        times = take_turns(compiled, inputs, options.rounds)
    pairs = zip(outputs["torch"].values(), outputs["onnx"].values(), strict=True)
    worst = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    print(f"largest difference of the outputs, relative to their scale: {worst:.1e}")
    for name, milliseconds in times.items():
        print(f"{name:5} median {statistics.median(milliseconds):.2f} ms, minimum {min(milliseconds):.2f} ms")
    medians, minima = (
        {name: f(t) for name, t in times.items()} for f in (statistics.median, min)
    )
    print(
        f"onnx / torch: {medians['onnx'] / medians['torch']:.3f} by medians, "
        f"{minima['onnx'] / minima['torch']:.3f} by minima"
    )


if __name__ == "__main__":
    main()
