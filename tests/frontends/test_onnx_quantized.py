"""Quantized models: ONNX files in QDQ and QOperator form in, static programs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_onnx_export import run_there  # noqa: E402

from tersor import frontends  # noqa: E402
from tersor.frontends.onnx.export import to_onnx  # noqa: E402
from tersor.ir import Program, Range, Value  # noqa: E402
from tersor.ir.dims import Dim  # noqa: E402
from tersor.passes import Pipeline, recipes  # noqa: E402

RANDOM = np.random.default_rng(0)
K, N = 24, 12


def qdq(codes: str = "uint8", weights: str = "int8", per_channel: bool = True) -> onnx.ModelProto:
    """y = dequantize(quantize(x)) @ dequantize(W [K, N]) + b, as quantizers write it."""
    low = 0 if weights == "uint8" else -127
    scale = np.abs(RANDOM.normal(0.01, 0.003, N if per_channel else ())).astype(np.float32)
    zero = np.zeros(scale.shape, weights) + np.array(128 if weights == "uint8" else 0, weights)
    tensors = {
        "fc.weight": RANDOM.integers(low, low + 255, (K, N)).astype(weights),
        "fc.scale": scale,
        "fc.zero": zero,
        "x.scale": np.float32(0.02),
        "x.zero": np.array(-11 if codes == "int8" else 117, codes),
        "fc.bias": RANDOM.normal(size=N).astype(np.float32),
    }
    axis = {"axis": 1} if per_channel else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x.scale", "x.zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["fc.weight", "fc.scale", "fc.zero"], ["wd"], **axis),
        helper.make_node("MatMul", ["xd", "wd"], ["product"]),
        helper.make_node("Add", ["product", "fc.bias"], ["y"]),
    ]
    return file(nodes, tensors)


def file(nodes: list, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", N])
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def operations(program: Program) -> list[str]:
    return sorted(n.target.name for n in program.main.calls())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


X = {"x": torch.from_numpy(RANDOM.normal(size=(7, K)).astype(np.float32))}


@pytest.mark.parametrize("codes", ["uint8", "int8"])
@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_layer_keeps_its_codes_and_becomes_an_integer_product(codes, weights, per_channel):
    model = qdq(codes, weights, per_channel)
    program = frontends.capture(model)
    assert operations(program) == ["dequantize", "dequantize", "linear", "quantize"]
    (linear,) = program.main.calls("linear")
    stored = program.main.parameter(linear.args[1].args[0])
    assert stored.dtype == torch.int8 and stored.shape == (N, K) and linear.meta["site"] == "fc"
    assert "fc.weight" not in program.parameters and "fc.weight.codes" in program.parameters
    expected = torch.from_numpy(run_there(model, X)["y"])
    torch.testing.assert_close(program(**X)["y"], expected, rtol=1e-5, atol=1e-4)

    whole, report = Pipeline(["quantize.integers"]).run(program)
    assert [s.reason for s in report.steps[0].skips] == []
    assert "integer_linear" in operations(whole) and "linear" not in operations(whole)
    # the bias is rounded to the grid of the sums
    torch.testing.assert_close(whole(**X)["y"], expected, rtol=1e-5, atol=2e-3)


def test_recipes_skip_what_is_quantized_and_say_so():
    program = frontends.capture(qdq())
    for recipe in ("fp32", "int8-dynamic"):
        after, report = recipes.get(recipe).run(program)
        assert cosine(after(**X)["y"], program(**X)["y"]) > 0.99999
    skips = [(step.name, skip.site, skip.reason) for step in report.steps for skip in step.skips]
    assert ("fold.norm_beta", "fc", "it is 'quantized' already") in skips
    assert ("quantize.rtn", "fc", "its weight is stored in codes already") in skips
    assert "integer_linear" in operations(after)


def test_a_cut_and_a_transposed_weight_find_their_codes():
    """Query, key and value in one stored matrix [K, 3 N], cut after the product; one scale per column."""
    tensors = {
        "qkv.weight": RANDOM.integers(-127, 128, (K, 3 * N)).astype(np.int8),
        "qkv.scale": RANDOM.uniform(0.01, 0.02, 3 * N).astype(np.float32),
        "ends": np.array([N, N, N]),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["qkv.weight", "qkv.scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["all"]),
        helper.make_node("Split", ["all", "ends"], ["q", "k", "v"], axis=-1),
        helper.make_node("Mul", ["q", "k"], ["qk"]),
        helper.make_node("Sub", ["qk", "v"], ["y"]),
    ]
    model = file(nodes, tensors)
    program = frontends.capture(model)
    weights = [program.main.parameter(n.args[1].args[0]) for n in program.main.calls("linear")]
    assert [w.dtype for w in weights] == [torch.int8] * len(weights)
    assert torch.equal(torch.cat(weights), torch.from_numpy(tensors["qkv.weight"]).t())
    # not onnxruntime: where only the weights are in codes it rounds the inputs too
    whole = X["x"] @ torch.from_numpy(tensors["qkv.weight"] * tensors["qkv.scale"])
    q, k, v = whole.split(N, dim=-1)
    torch.testing.assert_close(program(**X)["y"], q * k - v, rtol=1e-4, atol=1e-3)


def test_a_product_of_codes_is_decoded_multiplied_and_encoded():
    tensors = {
        "s": np.float32(0.02), "z": np.uint8(117), "w": RANDOM.integers(-127, 128, (K, N)).astype(np.int8),
        "ws": np.float32(0.01), "wz": np.int8(0), "ys": np.float32(0.05), "yz": np.uint8(128),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("QLinearMatMul", ["xq", "s", "z", "w", "ws", "wz", "ys", "yz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    model = file(nodes, tensors)
    program = frontends.capture(model)
    assert operations(program) == ["dequantize"] * 3 + ["linear"] + ["quantize"] * 2
    expected = torch.from_numpy(run_there(model, X)["y"])
    assert ((program(**X)["y"] - expected).abs() <= 0.0501).all()
    assert (program(**X)["y"] == expected).float().mean() > 0.98


# -- out


@pytest.mark.parametrize("codes", ["uint8", "int8"])
def test_a_static_program_goes_out_and_comes_back(codes):
    program = frontends.capture(qdq(codes))
    model = to_onnx(program)
    onnx.checker.check_model(model, full_check=True)
    used = [n.op_type for n in model.graph.node]
    assert used.count("DequantizeLinear") == 2 and "Transpose" not in used
    assert cosine(torch.from_numpy(run_there(model, X)["y"]), program(**X)["y"]) >= 0.9999
    again = frontends.capture(model)
    assert operations(again) == operations(program) and set(again.parameters) >= {
        "fc.weight.codes",
        "fc.weight.scale",
    }
    assert torch.equal(again(**X)["y"], program(**X)["y"])


def test_scales_per_row_and_group_are_arithmetic():
    program = frontends.capture(
        file(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            {"w": RANDOM.normal(size=(K, N)).astype(np.float32)},
        )
    )
    dynamic, _ = Pipeline(["quantize.rtn", "quantize.dynamic"]).run(program)
    model = to_onnx(dynamic)
    assert "QuantizeLinear" not in [n.op_type for n in model.graph.node]
    torch.testing.assert_close(
        torch.from_numpy(run_there(model, X)["y"]), dynamic(**X)["y"], rtol=1e-4, atol=1e-4
    )
    grouped, _ = Pipeline([{"pass": "quantize.rtn", "group": 8}]).run(program)
    check_there(grouped, X)


def test_groups_of_a_token_that_share_a_scale():
    made = Program()
    function = made.add_function("main", {"tokens": Range(1, 8)})
    x = function.add_input("x", Value("float32", (2, Dim.symbol("tokens"), 48)))
    weight = torch.from_numpy(RANDOM.normal(size=(N, 48)).astype(np.float32))
    build = function.builder()
    function.set_outputs({"y": build.linear(x, build.parameter("w", weight))})
    dynamic = {"pass": "quantize.dynamic", "group": 16}
    grouped, _ = Pipeline(["quantize.rtn", dynamic, "quantize.integers"]).run(made)
    x = torch.from_numpy(RANDOM.normal(size=(2, 5, 48)).astype(np.float32))
    x[..., 7] *= 100
    check_there(grouped, {"x": x})


def check_there(program: Program, inputs: dict[str, torch.Tensor]) -> None:
    """onnxruntime gives a program's own results."""
    got, expected = run_there(to_onnx(program), inputs)["y"], program(**inputs)["y"]
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)
