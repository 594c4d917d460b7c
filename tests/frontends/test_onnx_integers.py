"""Products of integers and operators on codes (dynamic quantization, QOperator files), against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_onnx_export import run_there  # noqa: E402

import tersor  # noqa: E402
from tersor import frontends  # noqa: E402
from tersor.ir import Program  # noqa: E402
from tersor.passes import Pipeline  # noqa: E402

RANDOM = np.random.default_rng(0)
B, T, K, N = 2, 5, 24, 12
X = {"x": torch.from_numpy(RANDOM.normal(size=(B, T, K)).astype(np.float32))}
FLOAT, UINT8, INT8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    """An operator; "_" is an absent operand, and onnxruntime's own operators begin with "ms."."""
    names = ["" if name == "_" else name for name in inputs.split()]
    domain = {"domain": "com.microsoft"} if op.startswith("ms.") else {}
    return helper.make_node(op.removeprefix("ms."), names, outputs.split(), **domain, **attributes)


def file(
    nodes: list[onnx.NodeProto], tensors: dict[str, object], inputs: dict | None = None, result: int = FLOAT
) -> onnx.ModelProto:
    """A model of these inputs (x float32 [batch, T, K]), whose result is y."""
    stored = [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()]
    given = [
        helper.make_tensor_value_info(name, *like)
        for name, like in (inputs or {"x": (FLOAT, ["batch", T, K])}).items()
    ]
    graph = helper.make_graph(nodes, "g", given, [helper.make_tensor_value_info("y", result, None)], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def stored_weight(
    weights: str, per_channel: bool = False, zero: bool = False, name: str = "w"
) -> dict[str, object]:
    """W [K, N] in codes, its scale and zero point, a bias."""
    shape, low = (N,) if per_channel else (), 0 if weights == "uint8" else -127
    middle = RANDOM.integers(120, 137, shape) if weights == "uint8" else RANDOM.integers(-9, 10, shape)
    return {
        f"{name}.weight_quantized": RANDOM.integers(low, low + 255, (K, N)).astype(weights),
        f"{name}.scale": RANDOM.uniform(0.005, 0.01, shape).astype(np.float32),
        f"{name}.zero": (middle if zero else middle * 0).astype(weights),
        f"{name}.bias": RANDOM.normal(size=N).astype(np.float32),
    }


def integer_layer(name: str, result: str) -> list[onnx.NodeProto]:
    """As onnxruntime's quantize_dynamic writes a linear layer behind a DynamicQuantizeLinear."""
    return [
        node("MatMulInteger", f"codes {name}.weight_quantized zero {name}.zero", f"{name}.whole"),
        node("Cast", f"{name}.whole", f"{name}.float", to=FLOAT),
        node("Mul", f"scale {name}.scale", f"{name}.scales"),
        node("Mul", f"{name}.float {name}.scales", f"{name}.product"),
        node("Add", f"{name}.bias {name}.product", result),
    ]


STEP = 0.0411  # of results in codes
ENCODE = node("DynamicQuantizeLinear", "x", "codes scale zero")
KINDS = [("int8", False, False), ("int8", True, False), ("int8", True, True)]
KINDS += [("uint8", False, True), ("uint8", True, True)]


def operations(program: Program) -> set[str]:
    return {n.target.name for n in program.main.calls()}


def in_integers(program: Program) -> Program:
    """Every layer and convolution as a product of integers."""
    whole, report = Pipeline(["quantize.integers"]).run(program)
    assert [s.reason for s in report.steps[0].skips] == []
    assert operations(whole) & {"linear", "conv1d", "conv2d", "integer_linear"} == {"integer_linear"}
    return whole


def agrees(program: Program, model: onnx.ModelProto, inputs: dict[str, torch.Tensor] = X) -> None:
    """Results are onnxruntime's, in codes and in whole numbers, but for the order of float multiplications."""
    expected = torch.from_numpy(run_there(model, inputs)["y"])
    for made in (program, in_integers(program)):
        torch.testing.assert_close(made(**inputs)["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weights", "per_channel", "zero"), KINDS)
def test_dynamic_quantization_becomes_a_layer_of_codes(weights, per_channel, zero):
    model = file([ENCODE, *integer_layer("w", "y")], stored_weight(weights, per_channel, zero))
    program = frontends.capture(model)
    (linear,) = program.main.calls("linear")
    codes = program.main.parameter(linear.args[1].args[0])
    assert codes.dtype == torch.int8 and codes.shape == (N, K) and linear.meta["site"] == "w"
    assert linear.args[0].args[0].target.name == "quantize" and len(linear.args) == 3  # its bias taken in
    agrees(program, model)


@pytest.mark.parametrize(("weights", "per_channel", "zero"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_forms_are_the_same_layer(weights, per_channel, zero, bias):
    tensors = stored_weight(weights, per_channel, zero)
    last = " w.bias" if bias else ""
    for nodes in (
        [node("ms.DynamicQuantizeMatMul", f"x w.weight_quantized w.scale w.zero{last}", "y")],
        [
            ENCODE,
            node("ms.MatMulIntegerToFloat", f"codes w.weight_quantized scale w.scale zero w.zero{last}", "y"),
        ],
    ):
        model = file(nodes, tensors)
        agrees(frontends.capture(model), model)


@pytest.mark.parametrize("order", ["scale w.scale", "w.scale scale"])
def test_scales_may_follow_one_by_one(order):
    first, second = order.split()
    nodes = [
        ENCODE,
        node("MatMulInteger", "codes w.weight_quantized zero w.zero", "whole"),
        node("Cast", "whole", "float", to=FLOAT),
        node("Mul", f"float {first}", "half"),
        node("Mul", f"{second} half", "y"),
    ]
    model = file(nodes, stored_weight("int8", per_channel=True))
    agrees(frontends.capture(model), model)


def test_layers_of_one_input_share_its_codes_and_their_sums():
    tensors = stored_weight("uint8", zero=True, name="q") | stored_weight("uint8", zero=True, name="k")
    nodes = [ENCODE, *integer_layer("q", "a"), *integer_layer("k", "b"), node("Sub", "a b", "y")]
    model = file(nodes, tensors)
    program = frontends.capture(model)
    assert len(program.main.calls("quantize")) == 1
    agrees(program, model)
    products = in_integers(program).main.calls("integer_linear")
    assert [n.meta["value"].shape[-1] for n in products].count(1) == 1 and len(products) == 3


def test_sums_without_scales_stay_whole_numbers():
    model = file(
        [ENCODE, node("MatMulInteger", "codes w.weight_quantized zero w.zero", "y")],
        stored_weight("int8", zero=True), result=TensorProto.INT32,
    )  # fmt: skip
    expected = torch.from_numpy(run_there(model, X)["y"])
    program = frontends.capture(model)
    for made in (program, in_integers(program)):
        assert torch.equal(made(**X)["y"], expected)


def test_products_without_zero_points_are_exact_at_any_size():
    """Sums of 200 times 255 times 127 leave the whole numbers that float32 has."""
    wide, inputs = (FLOAT, ["batch", 800]), {"x": torch.full((2, 800), 255.0)}
    nodes = [node("Cast", "x", "codes", to=UINT8), node("MatMulInteger", "codes w", "y")]
    w = np.full((800, 3), 127, np.int8) - np.eye(800, 3, dtype=np.int8)
    model = file(nodes, {"w": w}, {"x": wide}, TensorProto.INT32)
    program = frontends.capture(model)
    assert operations(program) == {"cast", "integer_linear"}
    y = program(**inputs)["y"]
    assert torch.equal(y, torch.from_numpy(run_there(model, inputs)["y"])) and y.min() > 2**24


def test_scales_that_something_else_reads_between_stay_outside():
    nodes = [*integer_layer("w", "z")[:-1], node("Add", "w.float w.product", "y")]
    model = file([ENCODE, *nodes], stored_weight("int8", per_channel=True))
    program = frontends.capture(model)
    agrees(program, model)
    assert not program.main.calls("linear")[0].meta["value"].shape[:-1] == ()
    assert len(program.main.calls("mul")) >= 1


@pytest.mark.parametrize("scale_of", ["rows", "columns", "all"])
@pytest.mark.parametrize("zero", [False, True])
def test_weights_decoded_by_arithmetic_keep_their_codes(scale_of, zero):
    """Cast, Sub, Mul instead of DequantizeLinear: weights in 8 bits, activations in float32."""
    shape = {"rows": (K, 1), "columns": (1, N), "all": ()}[scale_of]
    tensors = {
        "w.weight_quantized": RANDOM.integers(0, 255, (K, N)).astype(np.uint8),
        "w.scale": RANDOM.uniform(0.005, 0.01, shape).astype(np.float32),
        "w.zero": np.float32(128),
    }
    nodes = [
        node("Cast", "w.weight_quantized", "w.float", to=FLOAT),
        node("Sub", "w.float w.zero", "w.centred") if zero else node("Identity", "w.float", "w.centred"),
        node("Mul", "w.scale w.centred", "w.decoded"),
        node("MatMul", "x w.decoded", "y"),
    ]
    model = file(nodes, tensors)
    program = frontends.capture(model)
    (linear,) = program.main.calls("linear")
    assert program.main.parameter(linear.args[1].args[0]).dtype == torch.int8
    decoded = tensors["w.weight_quantized"].astype(np.float32) - (128 if zero else 0)
    expected = X["x"] @ torch.from_numpy(decoded * tensors["w.scale"])
    torch.testing.assert_close(program(**X)["y"], expected, rtol=1e-4, atol=1e-3)
    assert operations(program) == {"dequantize", "linear"}


# -- operators on codes


def encoded(name: str, result: str, code: str = "uint8") -> list[onnx.NodeProto]:
    return [node("QuantizeLinear", f"{name} {name}.s {name}.z", result)]


def scales(code: str = "uint8") -> dict[str, object]:
    """Scales and zero points of the operands x and v and of the result, in this order as "x.s x.z" and so on."""
    zero = {"uint8": (117, 130, 128), "int8": (-11, 2, 0)}[code]
    found: dict[str, object] = {}
    for name, scale, point in zip("xvy", (0.0213, 0.0297, STEP), zero, strict=True):
        found |= {f"{name}.s": np.float32(scale), f"{name}.z": np.array(point, code)}
    return found


def on_codes(op: str, operands: str, tensors: dict, inputs: dict | None = None, code="uint8", **attributes):
    nodes = [node("QuantizeLinear", "x x.s x.z", "xq"), node(op, operands, "yq", **attributes)]
    decode = node("DequantizeLinear", "yq y.s y.z", "y")
    return file([*nodes, decode], scales(code) | tensors, inputs)


def steps_apart(program: Program, model: onnx.ModelProto, inputs: dict, step: float) -> None:
    """Codes are onnxruntime's but for at most 2 % that are the next one: it divides by scales, a program multiplies."""
    expected = torch.from_numpy(run_there(model, inputs)["y"])
    apart = ((program(**inputs)["y"] - expected) / step).abs()
    assert apart.max() < 1.01 and (apart > 0.01).float().mean() <= 0.02


UNARY = {
    "ms.QLinearSigmoid": {}, "ms.QLinearLeakyRelu": {"alpha": 0.1},
    "ms.QLinearSoftmax": {"axis": -1, "opset": 13},
}  # fmt: skip


@pytest.mark.parametrize("code", ["uint8", "int8"])
@pytest.mark.parametrize("op", UNARY)
def test_operators_on_codes_are_those_of_fractions(op, code):
    fine = {"y.s": np.float32(1 / 256), "y.z": np.array(0 if code == "uint8" else -128, code)}
    model = on_codes(op, "xq x.s x.z y.s y.z", {} if "Leaky" in op else fine, code=code, **UNARY[op])
    steps_apart(frontends.capture(model), model, X, STEP if "Leaky" in op else 1 / 256)


@pytest.mark.parametrize("code", ["uint8", "int8"])
@pytest.mark.parametrize("op", ["ms.QLinearAdd", "ms.QLinearMul"])
def test_two_operands_in_codes(op, code):
    low = 0 if code == "uint8" else -128
    vector = {"v": RANDOM.integers(low, low + 256, K).astype(code)}
    model = on_codes(op, "xq x.s x.z v v.s v.z y.s y.z", vector, code=code)
    steps_apart(frontends.capture(model), model, X, STEP)


def test_a_choice_and_a_list_of_codes():
    given = {"x": (FLOAT, ["batch", T, K]), "m": (TensorProto.BOOL, ["batch", T, K])}
    inputs = X | {"m": torch.from_numpy(RANDOM.random((B, T, K)) < 0.5)}
    vector = {"v": RANDOM.integers(0, 256, (1, 1, K)).astype(np.uint8)}
    model = on_codes("ms.QLinearWhere", "m xq x.s x.z v v.s v.z y.s y.z", vector, given)
    steps_apart(frontends.capture(model), model, inputs, STEP)
    model = on_codes("ms.QLinearConcat", "y.s y.z xq x.s x.z xq x.s x.z", {}, axis=-1)
    steps_apart(frontends.capture(model), model, X, STEP)


IMAGE = {"x": torch.from_numpy(RANDOM.normal(size=(2, 3, 9, 8)).astype(np.float32))}
GIVEN = {"x": (FLOAT, ["batch", 3, 9, 8])}


def kernel_in_codes(per_channel: bool, shape: tuple[int, ...]) -> dict[str, object]:
    """A kernel in codes, its scales and zero points, a bias in whole numbers."""
    factors = shape[:1] if per_channel else ()
    return {
        "k": RANDOM.integers(-127, 128, shape).astype(np.int8),
        "k.s": RANDOM.uniform(0.002, 0.004, factors).astype(np.float32),
        "k.z": np.zeros(factors, np.int8),
        "bias": RANDOM.integers(-3000, 3000, shape[0]).astype(np.int32),
    }


@pytest.mark.parametrize("code", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_convolution_of_codes(per_channel, code):
    form = {"pads": [1, 1, 1, 1], "strides": [2, 1]}
    kernel = kernel_in_codes(per_channel, (4, 3, 3, 3))
    model = on_codes("QLinearConv", "xq x.s x.z k k.s k.z y.s y.z bias", kernel, GIVEN, code=code, **form)
    program = frontends.capture(model)
    for form in (program, in_integers(program)):
        steps_apart(form, model, IMAGE, STEP)


def test_patches_in_codes_go_from_the_file_to_integer_products():
    nodes = [
        node("QuantizeLinear", "x x.s x.z", "xq"),
        node("DequantizeLinear", "xq x.s x.z", "xd"),
        node("DequantizeLinear", "k k.s k.z", "w", axis=0),
        node("DequantizeLinear", "bias bias.s", "b"),
        node("Conv", "xd w b", "c", strides=[3, 4]),
        node("Relu", "c", "y"),
    ]
    kernel = kernel_in_codes(True, (4, 3, 3, 4)) | {"bias.s": np.float32(0.001)}
    model = file(nodes, scales() | kernel, GIVEN)
    expected = torch.from_numpy(run_there(model, IMAGE)["y"])
    program = frontends.capture(model)
    assert program.parameters["k.codes"].tensor.shape == (4, 3, 3, 4)
    torch.testing.assert_close(program(**IMAGE)["y"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_integers(program)(**IMAGE)["y"], expected, rtol=1e-4, atol=1e-4)
    compiled = tersor.compile(model, recipe="quantized")
    torch.testing.assert_close(torch.as_tensor(compiled(**IMAGE)["y"]), expected, rtol=1e-4, atol=1e-4)
    weights = tersor.compile(model, recipe="fp32")
    torch.testing.assert_close(torch.as_tensor(weights(**IMAGE)["y"]), expected, rtol=1e-4, atol=1e-4)


def test_channels_by_themselves_and_kernels_alone_stay_in_float32():
    kernel = kernel_in_codes(True, (3, 1, 3, 3))
    model = on_codes("QLinearConv", "xq x.s x.z k k.s k.z y.s y.z bias", kernel, GIVEN, group=3)
    after, report = Pipeline(["quantize.integers"]).run(program := frontends.capture(model))
    assert "it has groups" in [skip.reason for skip in report.steps[0].skips]
    for form in (program, after):
        steps_apart(form, model, IMAGE, STEP)
    nodes = [node("DequantizeLinear", "k k.s k.z", "w", axis=0), node("Conv", "x w", "y")]
    alone = frontends.capture(file(nodes, kernel_in_codes(True, (4, 3, 3, 3)), GIVEN))
    assert operations(alone) == {"conv2d"}


FRAMES = {"x": torch.from_numpy(RANDOM.normal(size=(2, 3, 11)).astype(np.float32))}


@pytest.mark.parametrize(("inputs", "form"), [
    (IMAGE, {"pads": [1, 1, 1, 1]}), (FRAMES, {"pads": [1, 1]}), (FRAMES, {"strides": [2]}),
], ids=["image", "frames", "frames, every other"])  # fmt: skip
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_convolution_of_integers(inputs, form, dynamic):
    given = {"x": (FLOAT, ["batch", *inputs["x"].shape[1:]])}
    axes = inputs["x"].ndim - 2
    kernel = {"k": RANDOM.integers(0, 256, (4, 3) + (3,) * axes).astype(np.uint8), "k.z": np.uint8(120)}
    if dynamic:
        nodes = [ENCODE, node("ConvInteger", "codes k zero k.z", "y", **form)]
    else:
        nodes = [node("QuantizeLinear", "x x.s x.z", "xq"), node("ConvInteger", "xq k x.z k.z", "y", **form)]
        kernel |= scales()
    model = file(nodes, kernel, given, TensorProto.INT32)
    expected = torch.from_numpy(run_there(model, inputs)["y"])
    program = frontends.capture(model)
    assert torch.equal(program(**inputs)["y"], expected)
    assert torch.equal(in_integers(program)(**inputs)["y"], expected)


@pytest.mark.parametrize(("op", "options"), [
    ("ms.QLinearGlobalAveragePool", {}),
    ("ms.QLinearAveragePool", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
])  # fmt: skip
def test_means_of_codes(op, options):
    model = on_codes(op, "xq x.s x.z y.s y.z", {}, GIVEN, **options)
    steps_apart(frontends.capture(model), model, IMAGE, STEP)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("in_codes", [True, False])
def test_a_gemm_of_codes(transposed, in_codes):
    x = {"x": X["x"][0]}
    w = RANDOM.integers(-127, 128, (N, K) if transposed else (K, N)).astype(np.int8)
    tensors = {
        "w": w, "w.s": RANDOM.uniform(0.002, 0.004, N).astype(np.float32), "w.z": np.zeros(N, np.int8),
        "c": RANDOM.integers(-3000, 3000, N).astype(np.int32), **scales(),
    }  # fmt: skip
    operands = "xq x.s x.z w w.s w.z c"
    given = {"x": (FLOAT, ["rows", K])}
    if in_codes:
        model = on_codes("ms.QGemm", f"{operands} y.s y.z", tensors, given, transB=int(transposed))
        steps_apart(frontends.capture(model), model, x, STEP)
    else:
        nodes = [
            node("QuantizeLinear", "x x.s x.z", "xq"),
            node("ms.QGemm", operands, "y", transB=int(transposed)),
        ]
        model = file(nodes, tensors, given)
        agrees(frontends.capture(model), model, x)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_attention_of_codes_is_three_integer_products(masked, per_channel):
    heads, columns = 3, 3 * K
    shape = (columns,) if per_channel else ()
    tensors = {
        "qkv": RANDOM.integers(-127, 128, (K, columns)).astype(np.int8),
        "qkv.scale": RANDOM.uniform(0.002, 0.004, shape).astype(np.float32),
        "qkv.zero": np.zeros(shape, np.int8),
        "qkv.bias": RANDOM.normal(size=columns).astype(np.float32),
    }
    mask = "mask" if masked else "_"
    attention = node(
        "ms.QAttention", f"codes qkv qkv.bias scale qkv.scale {mask} zero qkv.zero", "y", num_heads=heads
    )
    given, inputs = {"x": (FLOAT, ["batch", T, K])}, dict(X)
    if masked:
        given["mask"] = (TensorProto.INT32, ["batch", T])
        inputs["mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.int32)
    model = file([ENCODE, attention], tensors, given)
    program = frontends.capture(model)
    assert len(program.main.calls("attention")) == 1 and len(program.main.calls("linear")) == 3
    agrees(program, model, inputs)


def test_embeddings_in_codes():
    sizes = {"word": (20, K), "position": (T, K), "segment": (2, K), "gamma": (K,), "beta": (K,)}
    tensors: dict[str, object] = {}
    for name, shape in sizes.items():
        tensors[name] = RANDOM.integers(0, 256, shape).astype(np.uint8)
        tensors |= {f"{name}.s": np.float32(0.01), f"{name}.z": np.uint8(120)}
    operands = " ".join(["ids types", *sizes, "mask", *(f"{n}.s" for n in sizes), *(f"{n}.z" for n in sizes)])
    embed = node("ms.QEmbedLayerNormalization", operands, "y shown")
    given = dict.fromkeys(("ids", "types", "mask"), (TensorProto.INT32, ["batch", T]))
    inputs = {
        "ids": torch.from_numpy(RANDOM.integers(0, 20, (B, T)).astype(np.int32)),
        "types": torch.from_numpy(RANDOM.integers(0, 2, (B, T)).astype(np.int32)),
        "mask": torch.ones(B, T, dtype=torch.int32),
    }
    model = file([embed], tensors, given)
    expected = torch.from_numpy(run_there(model, inputs)["y"])
    torch.testing.assert_close(frontends.capture(model)(**inputs)["y"], expected, rtol=1e-4, atol=1e-4)


# -- compiled


@pytest.mark.parametrize(("weights", "zero"), [("int8", False), ("uint8", True)])
def test_a_model_quantized_elsewhere_runs_on_integer_kernels(weights, zero):
    tensors = stored_weight(weights, zero=zero, name="q") | stored_weight(weights, zero=zero, name="k")
    nodes = [ENCODE, *integer_layer("q", "a"), *integer_layer("k", "b"), node("Sub", "a b", "y")]
    model = file(nodes, tensors)
    compiled = tersor.compile(model, recipe="quantized", dynamic={"x": {0: ("batch", 1, 4)}})
    expected = run_there(model, X)["y"]
    np.testing.assert_allclose(compiled(**X)["y"], expected, rtol=1e-5, atol=1e-5)
