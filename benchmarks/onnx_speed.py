"""Speed carries over: a model captured from the file that torch.onnx.export writes, beside one captured from torch.

Says first whether both captures are the same program and become the same kernels, which leaves little to measure; then
both artifacts run in this process, bound to one CPU, in turns whose order alternates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import tvm
import tvm_ffi

import tersor
from benchmarks.models import MODELS, Model
from benchmarks.turns import take_turns
from tersor import targets
from tersor.codegen import lowering, rules  # noqa: F401  the rules fill the table of lowerings
from tersor.ir import diff
from tersor.passes import recipes
from tersor.peers.engines import onnx_file


class Distinct(Model):
    """A model without equal tensors or zeros: the exporter stores equal ones once, and drops biases of zeros."""

    @property
    def content(self) -> str:
        return f"{super().content}, distinct"

    def build(self) -> torch.nn.Module:
        model = super().build()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        return model


def kernels(program: tersor.Program) -> Counter[int]:
    """The kernels that a program becomes after the default recipe, by structure, with how often each is there."""
    program, _ = recipes.get("fp32").run(program)
    target = targets.resolve("native")
    module = lowering.lower(lowering.legalize(program), target).module
    bodies = (f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    return Counter(tvm_ffi.structural_hash(f.without_attr("global_symbol")) for f in bodies)


def main() -> None:
    """Print what the captures share, the largest difference of the outputs, and the ratio of the latencies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_speed", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="bert-base")
    parser.add_argument("--length", type=int, default=128, help="of the text, in tokens")
    parser.add_argument("--rounds", type=int, default=10, help="turns of three timed calls for each")
    options = parser.parse_args()
    model = Distinct(**vars(MODELS[options.model]))
    inputs = model.inputs(1, options.length)
    fixed = {
        name: {axis: (dim, size, size) for axis, dim in axes.items() for size in (inputs[name].shape[axis],)}
        for name, axes in model.dynamic_axes.items()
    }
    captured = {
        "torch": tersor.capture(model.build(), inputs),
        "onnx": tersor.capture(onnx_file(model, inputs), inputs, dynamic=fixed),
    }
    captured["onnx"].main.outputs = captured["torch"].main.outputs  # the exporter calls them after operators
    print(f"{options.model}, {model.label(1, options.length)}, 1 thread")
    same = captured["torch"].digest() == captured["onnx"].digest()
    print("programs:", "the same" if same else f"they differ\n{diff(captured['torch'], captured['onnx'])}")
    used = {name: kernels(program) for name, program in captured.items()}
    print(
        f"kernels: {'the same' if used['torch'] == used['onnx'] else 'they differ'}, {len(used['onnx'])} of them"
    )
    with tempfile.TemporaryDirectory() as folder:
        compiled = {
            name: tersor.compile(program, output=Path(folder, f"{name}.tersor"), threads=1)
            for name, program in captured.items()
        }
        outputs = {name: dict(model(**inputs)) for name, model in compiled.items()}
        times = take_turns(compiled, inputs, options.rounds)
    pairs = zip(outputs["torch"].values(), outputs["onnx"].values(), strict=True)
    worst = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    print(f"largest difference of the outputs, relative to their scale: {worst:.1e}")
    for name, milliseconds in times.items():
        print(f"{name:5} median {statistics.median(milliseconds):.2f} ms, minimum {min(milliseconds):.2f} ms")
    medians, minima = ({name: f(t) for name, t in times.items()} for f in (statistics.median, min))
    print(
        f"onnx / torch: {medians['onnx'] / medians['torch']:.3f} by medians, "
        f"{minima['onnx'] / minima['torch']:.3f} by minima"
    )


if __name__ == "__main__":
    main()
