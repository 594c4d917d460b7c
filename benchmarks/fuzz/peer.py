"""What onnxruntime makes of a model, compared with what ours does; and where the two may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from benchmarks.fuzz.case import Outcome, Stage
from benchmarks.fuzz.compare import IllConditioned, disagreement, spread
from benchmarks.fuzz.worker import PEER
from tersor.ir import Program, cost
from tersor.ir.dims import evaluate_shape
from tersor.ir.samples import sample_inputs

RUN = 32 << 20  # bytes that running a captured program may take

ORDERED = {
    "ReduceMax",
    "ReduceMin",
    "ArgMax",
    "ArgMin",
    "Hardmax",
    "TopK",
    "MaxPool",
    "GlobalMaxPool",
    "Sign",
}
"""Operators of which ONNX does not say what they make of NaN.

onnxruntime 1.31 compares, which NaN fails, so that its place decides: the largest of [2, 1, NaN] is 2, that of
[NaN, 1, 2] is NaN, and a window of NaN has the smallest float. Ours is NaN, as in torch, numpy and onnx's reference.
"""


def inputs_for(program: Program, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Numbers of every type; whole ones are small and not negative."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, value in program.main.inputs.items():
        shape = evaluate_shape(value.shape, sizes)
        if value.is_float:
            made[name] = torch.randn(shape, generator=generator).to(value.torch_dtype)
        else:
            made[name] = torch.randint(0, 2 if value.dtype == "bool" else 4, shape, generator=generator).to(
                value.torch_dtype
            )
    return made


def sample_inputs_of(program: Program, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Ids that are rows of their tables, masks of ones and zeros."""
    return sample_inputs(program.main, sizes, seed)


def small_sizes(program: Program) -> list[dict[str, int]]:
    """A few assignments of sizes within the ranges."""
    dims = program.main.dims
    return [{n: max(r.min, min(r.max, want + i)) for i, (n, r) in enumerate(dims.items())} for want in (1, 3)]


def too_large(program: Program, sizes: Mapping[str, int]) -> bool:
    """Whether running it at these sizes takes more memory than a fuzzed program may."""
    return max(f.peak_bytes for f in cost(program, sizes).functions.values()) > RUN


Inputs = Callable[[Program, Mapping[str, int], int], dict[str, torch.Tensor]]


def compare_with_onnxruntime(
    content: bytes | str, program: Program, stage: Stage, inputs_for: Inputs = inputs_for
) -> Outcome:
    """Runs both at a few sizes; says nothing where onnxruntime refuses the model or the inputs."""
    stage(PEER)
    try:
        session = _session(content)
    except Exception:  # its exceptions have no common class
        return Outcome("unchecked", "onnxruntime refuses the model")
    checked, why = 0, "onnxruntime refuses the inputs"
    for seed, sizes in enumerate(small_sizes(program)):
        if too_large(program, sizes):
            continue
        inputs = inputs_for(program, sizes, seed)
        stage(PEER)
        try:
            names = [o.name for o in session.get_outputs()]
            feeds = {i.name: inputs[i.name].numpy() for i in session.get_inputs() if i.name in inputs}
            found = session.run(names, feeds)
            theirs = {n: torch.from_numpy(np.array(v)) for n, v in zip(names, found, strict=True)}
        except Exception:
            continue
        stage("torch")
        try:
            ours, slack = spread(program.main, inputs, seed)
        except Exception as error:
            return Outcome("wrong", "does not run", f"at {sizes}: {type(error).__name__}: {error}\n{program}")
        stated = {o.name: o.shape for o in session.get_outputs()}
        if any(_keeps_empty_axis(stated[n], theirs[n], ours[n]) for n in ours):
            why = "onnxruntime contradicts the file"
            continue
        for name, reference in theirs.items():
            if (
                reference.dtype in (torch.int32, torch.int64)
                and name in slack
                and reference.shape == slack[name].shape
            ):
                # what fractions without an integer (infinity, NaN) become is not defined
                slack[name][reference == torch.iinfo(reference.dtype).min] = float("inf")
        try:
            wrong = disagreement(ours, theirs, slack)
            if wrong:
                placed = ordered_nan(content, feeds)
                theirs = {n: value for n, value in theirs.items() if n not in placed}
                if not theirs:
                    why = "NaN has no order"
                    continue
                wrong = disagreement(ours, theirs, slack)
        except IllConditioned:
            why = "rounding decides"
            continue
        if wrong:
            return Outcome("wrong", "captured", f"at {sizes}: {wrong}\n{program}")
        checked += 1
    return Outcome("right") if checked else Outcome("unchecked", why)


def _keeps_empty_axis(stated: Sequence[int | str | None], theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether onnxruntime returned no elements in a shape that the file rules out, and we the shape that it states.

    onnxruntime 1.31 does not reduce tensors without elements: ReduceSum over an axis of length 0 keeps it, ArgMin of
    [0, 5, 2] stays [0, 5, 2]. The shapes that onnx infers, and its reference, follow the operators' definition.
    """
    return theirs.numel() == 0 and tuple(stated) == tuple(ours.shape) != tuple(theirs.shape)


def ordered_nan(content: bytes | str, feeds: Mapping[str, np.ndarray]) -> set[str]:
    """Names of the values that depend on where a NaN stands among the operands of an `ORDERED` operator."""
    stored = Path(content) if isinstance(content, str) else None
    model = onnx.load(stored, load_external_data=False) if stored else onnx.ModelProto.FromString(content)
    nodes, present = model.graph.node, {o.name for o in model.graph.output}
    made = {name for node in nodes for name in node.output}
    watched = sorted({node.input[0] for node in nodes if node.op_type in ORDERED} & made)
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in watched if n not in present)
    content = model.SerializeToString()
    if stored:  # beside it: external data is found from there
        content = str(stored.with_name("watched.onnx"))
        onnx.save(model, content)
    found = dict(zip(watched, _session(content).run(watched, dict(feeds)), strict=True)) if watched else {}
    placed: set[str] = set()
    for node in nodes:
        by_place = node.op_type in ORDERED and np.isnan(found.get(node.input[0], 0.0)).any()
        if by_place or placed & set(node.input):
            placed |= set(node.output)
    return placed


def _session(content: bytes | str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
