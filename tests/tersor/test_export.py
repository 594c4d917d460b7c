"""What passes leave of a model, written as an ONNX file: smaller there too, and right in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

import tersor  # noqa: E402
from tersor.passes.recipes import get  # noqa: E402

HIDDEN, HEADS, NEURONS = 32, 4, 48
AXES = {0: ("batch", 1, 4), 1: ("length", 1, 16)}


def _bert() -> torch.nn.Module:
    """A BERT of which, in the first layer, a head and twenty neurons have no influence."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=60, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
            intermediate_size=NEURONS, max_position_embeddings=16,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        first = model.encoder.layer[0]
        first.attention.output.dense.weight[:, : HIDDEN // HEADS] = 0
        first.output.dense.weight[:, :20] = 0
    return model


def _run(model: object, inputs: dict[str, torch.Tensor], level: object = None) -> dict[str, np.ndarray]:
    """In onnxruntime, from a file or as it is, with so many of its optimizations."""
    options = runtime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [result.name for result in session.get_outputs()]
    return dict(zip(names, session.run(names, {n: x.numpy() for n, x in inputs.items()}), strict=True))


@pytest.mark.parametrize("recipe", ["none", "fp32"])
def test_a_recipe_carries_over(recipe: str, tmp_path: Path) -> None:
    model = _bert()
    ids = torch.tensor([[5, 9, 2, 40, 7], [3, 8, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    program = tersor.capture(model, inputs, dict.fromkeys(inputs, AXES))
    smaller, _ = get(recipe).run(program)
    path = tmp_path / "bert.onnx"
    tersor.to_onnx(smaller, path)
    found = _run(path, inputs)
    with torch.no_grad():
        expected = model(**inputs)
    for name, got in found.items():
        torch.testing.assert_close(torch.from_numpy(got), expected[name], rtol=1e-4, atol=1e-5)
    again = tersor.capture(path)
    assert again.digest() == smaller.digest()
    (first, second) = again.main.calls("attention")
    removed = recipe == "fp32"
    assert (first.kwargs["heads"], second.kwargs["heads"]) == (HEADS - removed, HEADS)
    up = again.parameters["encoder.layer.0.intermediate.dense.weight"].tensor
    assert up.shape == (NEURONS - 20 * removed, HIDDEN)


def test_codes_between_passes_carry_over(tmp_path: Path) -> None:
    """A program in QDQ form is float32 in ONNX as well: its codes are rounded and clipped there."""
    from tersor.ir import Program, Value

    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (3, 8)))
    build = function.builder()
    scale = build.parameter("scale", torch.tensor(0.05))
    codes = build.quantize(x, scale, dtype="int8")
    function.set_outputs(
        {"y": build.linear(build.dequantize(codes, scale), build.parameter("w", torch.randn(4, 8)))}
    )
    path = tmp_path / "codes.onnx"
    tersor.to_onnx(program, path)
    x = torch.randn(3, 8) * 4
    torch.testing.assert_close(torch.from_numpy(_run(path, {"x": x})["y"]), program(x=x)["y"])


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic", "bf16", "fp16"])
@pytest.mark.parametrize("integers", [True, False], ids=["in integers", "decoded"])
def test_fewer_bits_carry_over(recipe: str, integers: bool) -> None:
    """Every recipe with its integer products and, as other engines like it better, before: there and back."""
    pipeline = get(recipe)
    if not integers:
        if "quantize.integers" not in [step.name for step in pipeline.passes]:
            pytest.skip("it has no integer products")
        pipeline = pipeline.remove("quantize.integers")
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = tersor.capture(_bert(), inputs, dict.fromkeys(inputs, AXES))
    smaller, _ = pipeline.run(program, calibration=[inputs])
    model = tersor.to_onnx(smaller)
    expected = smaller(**inputs)
    # onnxruntime's optimizer rounds the inputs of layers whose weights alone it sees in codes
    exact = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL if integers else None
    found = _run(model, inputs, exact or runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC)
    for name, got in found.items():
        assert cosine(torch.from_numpy(got), expected[name]) >= 0.999999
    again = tersor.capture(model, dynamic=dict.fromkeys(inputs, AXES))
    for name, got in again(**inputs).items():
        assert cosine(got, expected[name]) >= 0.999999
    for op in ("integer_linear", "linear"):
        assert len(again.main.calls(op)) == len(smaller.main.calls(op)), op


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
