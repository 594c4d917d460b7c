"""Single operators against onnxruntime, over the opsets in which they change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tersor import frontends  # noqa: E402
from tersor.errors import CaptureError  # noqa: E402

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 3, 4, 5)).astype(np.float32)
ROWS = RANDOM.standard_normal((2, 6, 8)).astype(np.float32)
VECTOR = RANDOM.standard_normal(8).astype(np.float32)
INTEGERS = RANDOM.integers(-9, 9, (3, 4))
BITS = RANDOM.integers(0, 2, (3, 4)).astype(bool)


IMAGE = RANDOM.standard_normal((2, 4, 7, 8)).astype(np.float32)
KERNEL = RANDOM.standard_normal((4, 2, 3, 2)).astype(np.float32)


def ints(*values):
    return np.array(values, dtype=np.int64)


def model(op, inputs, constants=(), opset=17, domain="", outputs=1, **attributes):
    """One operator; arrays in ``constants`` (position -> array) are stored in the file."""
    constants = dict(constants)
    names = [
        "" if i in constants and constants[i] is None else f"{'c' if i in constants else 'x'}{i}"
        for i in range(len(inputs) + len(constants))
    ]
    free = iter(inputs)
    values = {n: (constants[i] if i in constants else next(free)) for i, n in enumerate(names) if n}
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in values.items()
            if n[0] == "x"
        ],
        [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(v, n) for n, v in values.items() if n[0] == "c"],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return made, {n: v for n, v in values.items() if n[0] == "x"}


def compare(made, inputs, tolerance=2e-6):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)
    program = frontends.capture(made)
    actual = program(**{n: torch.from_numpy(v) for n, v in inputs.items()})
    assert len(expected) == len(actual)
    for wanted, got in zip(expected, actual.values(), strict=True):
        assert got.numpy().dtype == wanted.dtype and got.shape == wanted.shape
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(got.numpy(), wanted, rtol=tolerance * 10, atol=tolerance)
        else:
            np.testing.assert_array_equal(got.numpy(), wanted)


def resize(sizes, **attributes):
    return model("Resize", [IMAGE], {1: None, 2: None, 3: ints(2, 4, *sizes)}, opset=19, **attributes)


FLOATS = [
    "Neg", "Abs", "Reciprocal", "Exp", "Floor", "Ceil", "Round", "Cos", "Sin", "Tan", "Sinh", "Tanh", "Erf", "Sigmoid",
    "Relu", "Sign", "IsNaN", "IsInf", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Selu", "Celu", "Softplus",
    "Softsign", "ThresholdedRelu", "Identity", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Transpose",
]  # fmt: skip


@pytest.mark.parametrize("op", FLOATS)
def test_one_float(op):
    compare(*model(op, [X * 2]))


def test_halves_round_to_even():
    compare(*model("Round", [np.array([-2.5, -1.5, -0.5, 0.49999997, 0.5, 1.5, 2.5, 3.5], np.float32)]))


def test_logarithm_and_root():
    for op in ("Log", "Sqrt"):
        compare(*model(op, [np.abs(X) + 0.1]))


@pytest.mark.parametrize(
    "op", ["Add", "Sub", "Mul", "Div", "Less", "GreaterOrEqual", "Equal", "PRelu", "Mod", "Pow"]
)
def test_two_floats_broadcast(op):
    options = {"fmod": 1} if op == "Mod" else {}
    x = np.abs(X) if op == "Pow" else X
    compare(*model(op, [x, np.abs(X[0, :, :1]) + 0.5], **options))
    compare(*model(op, [x], {1: np.array([1.5], np.float32)}, **options))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Mod", "Less", "Equal", "Pow"])
def test_two_integers(op):
    other = np.array([[3], [-2], [5]]) if op != "Pow" else np.array([[3], [2], [1]])
    compare(*model(op, [INTEGERS, other]))


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_booleans(op):
    compare(*model(op, [BITS, ~BITS[:1]]))


def test_a_constant_of_one_element_may_add_axes():
    number, one = np.array(0.5, np.float32), np.full((1, 1), 2, np.float32)
    compare(*model("Add", [number], {1: one}))
    compare(*model("Where", [np.array(True)], {1: one, 2: one}))
    compare(*model("PRelu", [X[0, 0]], {0: np.float32(-0.5)}))


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceLogSumExp"])
def test_reductions_of_integers_give_integers(op):
    compare(*model(op, [INTEGERS.astype(np.int32)], axes=[1]))


def test_no_axes_may_mean_every_element_by_itself():
    for op in ("ReduceL1", "ReduceSumSquare", "ReduceMax"):
        compare(*model(op, [X], opset=20, noop_with_empty_axes=1))


def test_reductions_of_nothing_have_the_shape_that_onnx_infers():
    (total,) = frontends.capture(model("ReduceSum", [], {0: ints(), 1: ints(-1)})[0])().values()
    assert total.tolist() == [0]
    made, inputs = model("ArgMin", [np.zeros((0, 5, 2), np.int32)], axis=-1)
    (least,) = frontends.capture(made)(x0=torch.from_numpy(inputs["x0"])).values()
    assert least.shape == (0, 5, 1)


@pytest.mark.parametrize("indexed", [0, 5])
def test_indices_of_no_axes_or_too_many_are_refused(indexed):
    made, _ = model("ScatterND", [], {0: X, 1: np.zeros((2, indexed), np.int64), 2: X})
    with pytest.raises(CaptureError, match=f"indexes {indexed} axes of 4"):
        frontends.capture(made)


def test_fractional_powers_of_whole_numbers():
    compare(*model("Pow", [np.array([1, 2, 3])], {1: np.array([0.5, 2.5, 2.2], np.float32)}))


def test_indices_of_several_axes_count_from_the_end():
    compare(*model("GatherND", [X], {1: ints([[-1, 0], [1, -3]])}, opset=13))


def test_a_split_into_more_parts_than_are_read():
    made, inputs = model("Split", [X], opset=18, axis=3, num_outputs=3, outputs=3)
    compare(made, inputs)
    made.graph.node[0].attribute[1].i = 1 << 40
    frontends.capture(made)


CASES = {
    "Clip": model("Clip", [X], {1: np.float32(-0.5), 2: np.float32(0.7)}),
    "Clip, no lower end": model("Clip", [X], {1: None, 2: np.float32(0.7)}),
    "Max": model("Max", [X, X[::-1].copy(), X[0]]),
    "Mean": model("Mean", [X, X[::-1].copy()]),
    "Where": model("Where", [BITS, INTEGERS], {2: np.array(-7)}),
    "Where, lowest float": model("Where", [BITS[0, :, None], X[0, :2]], {2: np.finfo(np.float32).min}),
    "Cast": model("Cast", [X * 9], to=TensorProto.INT32),
    "Not": model("Not", [BITS]),
    "Gelu": model("Gelu", [X], opset=20),
    "Gelu, tanh": model("Gelu", [X], opset=20, approximate="tanh"),
    "Mish": model("Mish", [X], opset=18),
    "Reshape": model("Reshape", [X], {1: ints(0, -1, 5)}),
    "Squeeze 11": model("Squeeze", [X[:, :1]], opset=11, axes=[1]),
    "Squeeze 13": model("Squeeze", [X[:, :1]], {1: ints(-3)}),
    "Unsqueeze 11": model("Unsqueeze", [X], opset=11, axes=[0, -1]),
    "Unsqueeze 13": model("Unsqueeze", [X], {1: ints(-1, 0)}),
    "Expand": model("Expand", [X[:, :, :1]], {1: ints(3, 4, 1)}),
    "Tile": model("Tile", [INTEGERS], {1: ints(2, 3)}),
    "Concat": model("Concat", [X, X], axis=-2),
    "Split 11": model("Split", [X], opset=11, outputs=2, axis=2, split=[1, 3]),
    "Split 13": model("Split", [X], {1: ints(3, 1)}, outputs=2, axis=2),
    "Split 18": model("Split", [X], opset=18, outputs=3, axis=3, num_outputs=3),
    "Slice": model("Slice", [X], {1: ints(1, -3), 2: ints(2**40, -1), 3: ints(1, -1)}),
    "Slice, steps": model("Slice", [X], {1: ints(0), 2: ints(99), 3: ints(3), 4: ints(2)}),
    "Slice, backwards": model("Slice", [X], {1: ints(-1), 2: ints(-(2**62)), 3: ints(1), 4: ints(-1)}),
    "Gather": model("Gather", [X, INTEGERS % 3], axis=1),
    "Gather, negative": model("Gather", [X], {1: ints(-1, 0, -2)}, axis=2),
    "Gather, one": model("Gather", [X], {1: np.array(-1)}, axis=2),
    "GatherElements": model("GatherElements", [INTEGERS, INTEGERS % 3], axis=0),
    "GatherND": model("GatherND", [X, np.array([[0, 2], [1, 1]])]),
    "GatherND, negative": model("GatherND", [X], {1: ints([0, -2], [-1, 1])}),
    "OneHot": model("OneHot", [INTEGERS % 5], {1: np.array(5), 2: np.array([0.5, 2], np.float32)}, axis=1),
    "TopK": model("TopK", [X], {1: ints(3)}, outputs=2, axis=2),
    "TopK, smallest": model("TopK", [X], {1: ints(2)}, outputs=2, largest=0),
    "ScatterElements": model("ScatterElements", [X, ints(1, 0, 1)[None, :, None, None], X[:1, :, :1, :1]], axis=0),
    "ScatterElements, negative": model(
        "ScatterElements", [X], {1: ints(-1, 1)[None, None, :, None], 2: X[:1, :1, :2, :1]}, opset=18, axis=2,
        reduction="max",
    ),
    "ScatterND": model("ScatterND", [X], {1: np.array([[0, 2], [1, -1]]), 2: X[0, :2].copy()}),
    "ScatterND, added": model(
        "ScatterND", [X], {1: np.array([[1], [1]]), 2: X.copy()}, opset=18, reduction="add"
    ),
    "DepthToSpace": model("DepthToSpace", [IMAGE], blocksize=2),
    "DepthToSpace, columns": model("DepthToSpace", [IMAGE], blocksize=2, mode="CRD"),
    "SpaceToDepth": model("SpaceToDepth", [IMAGE[:, :, :6].copy()], blocksize=2),
    "CumSum, exclusive": model("CumSum", [X], {1: np.array(2)}, exclusive=1),
    "CumSum, reverse": model("CumSum", [X], {1: np.array(2)}, reverse=1),
    "CumSum, both": model("CumSum", [INTEGERS], {1: np.array(-1)}, exclusive=1, reverse=1),
    "Trilu": model("Trilu", [X], {1: np.array(1)}, upper=0),
    "Pad": model("Pad", [X], {1: ints(0, 1, 0, 2, 0, 0, 3, 0), 2: np.float32(1.5)}),
    "Pad 18": model("Pad", [X], {1: ints(1, 2), 2: None, 3: ints(-2)}, opset=18),
    "Pad, negative": model("Pad", [X], {1: ints(0, 0, -1, 2, 0, 0, 1, -1)}),
    "Pad, reflect": model("Pad", [X], {1: ints(0, 0, 1, 2, 0, 0, 3, 0)}, mode="reflect"),
    "Pad, edge": model("Pad", [X], {1: ints(0, 0, 1, 2, 0, 0, 3, 0)}, mode="edge"),
    "Pad, wrap": model("Pad", [X], {1: ints(0, 0, 1, 2, 0, 0, 3, 0)}, mode="wrap", opset=19),
    "CumSum": model("CumSum", [X], {1: np.array(2)}),
    "EyeLike": model("EyeLike", [INTEGERS], k=1, dtype=1),
    "Shape": model("Shape", [X]),
    "Size": model("Size", [X]),
    "NonZero": model("NonZero", [], {0: np.array([0, 1, 1])}),
    "ReduceSum 11": model("ReduceSum", [X], opset=11, axes=[1, -1], keepdims=0),
    "ReduceSum 13": model("ReduceSum", [X], {1: ints(1)}),
    "ReduceMean 17": model("ReduceMean", [X], axes=[-1]),
    "ReduceMean 18": model("ReduceMean", [X], {1: ints(-1)}, opset=18, keepdims=0),
    "ReduceMax": model("ReduceMax", [X]),
    "ReduceMin": model("ReduceMin", [INTEGERS], axes=[1]),
    "ReduceL1": model("ReduceL1", [X], axes=[1]),
    "ReduceL2": model("ReduceL2", [X], axes=[1]),
    "ReduceSumSquare": model("ReduceSumSquare", [X], axes=[1]),
    "ReduceLogSumExp": model("ReduceLogSumExp", [X], axes=[1], keepdims=0),
    "ArgMax": model("ArgMax", [X], axis=2),
    "ArgMin": model("ArgMin", [X], axis=-1, keepdims=0),
    "Softmax 11": model("Softmax", [X], opset=11, axis=2),
    "Softmax 13": model("Softmax", [X], axis=2),
    "LogSoftmax 11": model("LogSoftmax", [X], opset=11),
    "LogSoftmax 13": model("LogSoftmax", [X]),
    "Hardmax": model("Hardmax", [X], axis=1),
    "MatMul": model("MatMul", [ROWS, ROWS[0].T.copy()]),
    "MatMul, vector": model("MatMul", [ROWS], {1: VECTOR}),
    "Gemm": model("Gemm", [ROWS[0], ROWS[1]], {2: np.float32([[2.0]])}, transB=1, alpha=0.5, beta=3.0),
    "Gemm, stored": model("Gemm", [ROWS[0]], {1: ROWS[1], 2: VECTOR[:6].copy()}, transB=1),
    "Gemm, transposed": model("Gemm", [ROWS[0], ROWS[1]], transA=1),
    "Einsum": model("Einsum", [X, X], equation="bhqd,bhkd->bhqk"),
    "Einsum, order": model("Einsum", [ROWS, VECTOR], equation="btd,d->tb"),
    "Einsum, one": model("Einsum", [X], equation="abcd->ca"),
    "Conv": model("Conv", [X], {1: X[:, :, :3, :2].copy(), 2: VECTOR[:2].copy()}, pads=[1, 0, 1, 0], strides=[2, 1]),
    "Conv, uneven": model("Conv", [X], {1: X[:, :, :3, :2].copy()}, pads=[0, 0, 1, 1]),
    "Conv, same": model("Conv", [X], {1: X[:, :, :3, :2].copy()}, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv, one axis": model("Conv", [ROWS], {1: ROWS[:, :3, :3].copy()}, group=2),
    "Conv, dilated": model("Conv", [IMAGE], {1: KERNEL}, dilations=[2, 1], group=2, strides=[1, 2]),
    "ConvTranspose": model(
        "ConvTranspose", [IMAGE], {1: KERNEL, 2: VECTOR[:2].copy()}, strides=[2, 1], pads=[1, 0, 0, 1]
    ),
    "ConvTranspose, groups": model(
        "ConvTranspose", [IMAGE], {1: KERNEL}, group=2, strides=[2, 3], output_padding=[1, 2], dilations=[1, 2]
    ),
    "ConvTranspose, apart": model("ConvTranspose", [IMAGE], {1: KERNEL, 2: VECTOR[:2].copy()}, strides=[3, 2]),
    "ConvTranspose, same": model("ConvTranspose", [IMAGE], {1: KERNEL}, strides=[2, 2], auto_pad="SAME_UPPER"),
    "ConvTranspose, one axis": model(
        "ConvTranspose", [ROWS], {1: ROWS[:1, :, :3].repeat(6, 0)}, strides=[2], pads=[1, 1]
    ),
    "MaxPool": model("MaxPool", [IMAGE], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "MaxPool, ceil": model("MaxPool", [IMAGE], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, dilations=[1, 2]),
    "MaxPool, same": model("MaxPool", [IMAGE], kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
    "MaxPool, one axis": model("MaxPool", [ROWS], kernel_shape=[3], strides=[2]),
    "AveragePool": model("AveragePool", [IMAGE], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "AveragePool, uneven": model("AveragePool", [IMAGE], kernel_shape=[3, 2], pads=[0, 0, 2, 1], strides=[2, 1]),
    "AveragePool, counted": model(
        "AveragePool", [IMAGE], kernel_shape=[3, 2], pads=[0, 0, 2, 1], count_include_pad=1
    ),
    "AveragePool, ceil": model(
        "AveragePool", [IMAGE], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, opset=19
    ),
    "Resize, nearest": resize((7, 9), coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "Resize, half pixel": resize((9, 13), nearest_mode="round_prefer_ceil"),
    "Resize, linear": resize((3, 17), mode="linear"),
    "Resize, corners": resize((9, 17), mode="linear", coordinate_transformation_mode="align_corners"),
    "Resize, torch": resize((9, 3), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    "Resize, cubic": resize((9, 17), mode="cubic", cubic_coeff_a=-0.5),
    "Resize, cubic inside": resize((9, 17), mode="cubic", exclude_outside=1),
    "Resize, smoothed": resize((4, 3), mode="linear", antialias=1),
    "Resize, smoothed inside": resize((4, 3), mode="cubic", antialias=1, exclude_outside=1),
    "Resize, smoothed cubic": resize((4, 3), mode="cubic", antialias=1, cubic_coeff_a=-0.5),
    "Resize, scales": model("Resize", [IMAGE], {1: None, 2: np.float32([1, 1, 1.6, 0.7])}, mode="linear"),
    "Resize, axes": model("Resize", [IMAGE], {1: None, 2: None, 3: ints(9, 9)}, opset=18, axes=[3, 2], mode="linear"),
    "LayerNormalization": model("LayerNormalization", [ROWS], {1: VECTOR, 2: VECTOR[::-1].copy()}),
    "LayerNormalization, two axes": model("LayerNormalization", [ROWS], {1: ROWS[0], 2: ROWS[1]}, axis=1),
    "RMSNormalization": model("RMSNormalization", [ROWS], {1: VECTOR}, opset=23),
    "BatchNormalization": model(
        "BatchNormalization", [X], {i: np.abs(VECTOR[i : i + 3]) + 0.1 for i in range(1, 5)}
    ),
    "InstanceNormalization": model("InstanceNormalization", [X], {1: VECTOR[:3].copy(), 2: VECTOR[3:6].copy()}),
    "LpNormalization": model("LpNormalization", [X], axis=1),
    "LpNormalization of zeros": model("LpNormalization", [X * (X > 1)], axis=-1, p=1),
    "Attention": model("Attention", [X, X, X], opset=23, is_causal=1),
    "Attention, capped": model("Attention", [X * 3, X * 3, X], opset=23, softcap=1.5),
    "Attention, merged": model(
        "Attention", [ROWS, ROWS[..., :4].copy(), ROWS[..., 4:].copy()], opset=23, q_num_heads=4, kv_num_heads=2
    ),
    "RotaryEmbedding": model(
        "RotaryEmbedding", [X[..., :4].copy(), np.cos(X[:, 0, :, :2]), np.sin(X[:, 0, :, :2])], opset=23
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    compare(*CASES[case])


MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
WIDE = RANDOM.standard_normal((8, 24)).astype(np.float32) * 0.3
IDS = np.array([[1, 2, 3, 0, 1, 2], [2, 2, 1, 0, 0, 3]], np.int32)
TABLES = {i: RANDOM.standard_normal((7, 8)).astype(np.float32) for i in (2, 3, 4)}
CONTRIB = {
    "Gelu": ("Gelu", [ROWS], {}, {}),
    "BiasGelu": ("BiasGelu", [ROWS], {1: VECTOR}, {}),
    "FastGelu": ("FastGelu", [ROWS], {1: VECTOR}, {}),
    "QuickGelu": ("QuickGelu", [ROWS], {}, {}),
    "FusedMatMul": ("FusedMatMul", [ROWS, ROWS], {}, {"transB": 1, "alpha": 0.25}),
    "SkipLayerNormalization": (
        "SkipLayerNormalization", [ROWS, ROWS * 2], {2: VECTOR, 3: VECTOR + 1, 4: VECTOR}, {}
    ),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization", [ROWS, ROWS * 2], {2: VECTOR, 3: VECTOR}, {"epsilon": 1e-6}
    ),
    "Attention": ("Attention", [ROWS], {1: WIDE, 2: WIDE[0]}, {"num_heads": 2}),
    "Attention, mask": ("Attention", [ROWS], {1: WIDE, 2: WIDE[0], 3: MASK}, {"num_heads": 2}),
    "Attention, lengths": (
        "Attention", [ROWS], {1: WIDE, 2: WIDE[0], 3: MASK.sum(1).astype(np.int32)}, {"num_heads": 2}
    ),
    "Attention, causal": ("Attention", [ROWS], {1: WIDE, 2: WIDE[0]}, {"num_heads": 2, "unidirectional": 1}),
    "MultiHeadAttention": ("MultiHeadAttention", [ROWS, ROWS * 0.5, ROWS + 1], {3: WIDE[0]}, {"num_heads": 4}),
    "MultiHeadAttention, mask": (
        "MultiHeadAttention", [ROWS, ROWS * 0.5, ROWS + 1], {3: WIDE[0], 4: MASK}, {"num_heads": 4}
    ),
    "EmbedLayerNormalization": (
        "EmbedLayerNormalization", [IDS, IDS % 2], {**TABLES, 5: VECTOR, 6: VECTOR, 7: MASK}, {"outputs": 2}
    ),
    "RotaryEmbedding": (
        "RotaryEmbedding", [ROWS], {1: np.array([1]), 2: TABLES[2][:, :2].copy(), 3: TABLES[3][:, :2].copy()},
        {"num_heads": 2},
    ),
    "RotaryEmbedding, interleaved": (
        "RotaryEmbedding", [ROWS], {1: IDS.astype(np.int64), 2: TABLES[2][:, :2].copy(), 3: TABLES[3][:, :2].copy()},
        {"num_heads": 2, "interleaved": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRIB)
def test_operators_of_onnxruntime(case):
    op, inputs, constants, options = CONTRIB[case]
    compare(*model(op, inputs, constants, domain="com.microsoft", **options), tolerance=1e-5)


CODES = RANDOM.integers(-128, 128, (8, 5)).astype(np.int8)


@pytest.mark.parametrize(
    "op, inputs, constants, options",
    [
        ("DequantizeLinear", [CODES], {1: np.float32(0.1), 2: np.int8(3)}, {}),
        ("DequantizeLinear", [], {0: CODES, 1: np.abs(VECTOR[:5]), 2: np.zeros(5, np.int8)}, {"axis": 1}),
        ("DequantizeLinear", [CODES], {1: np.abs(VECTOR)}, {"axis": 0}),
        ("QuantizeLinear", [ROWS], {1: np.float32(0.013), 2: np.uint8(100)}, {}),
        ("QuantizeLinear", [ROWS], {1: np.abs(VECTOR) / 50, 2: np.zeros(8, np.int8)}, {"axis": -1}),
        ("DynamicQuantizeLinear", [ROWS], {}, {"outputs": 3}),
        ("DynamicQuantizeLinear", [ROWS * 0], {}, {"outputs": 3}),
        (
            "MatMulInteger",
            [RANDOM.integers(0, 255, (3, 8)).astype(np.uint8)],
            {1: CODES, 2: np.uint8(120), 3: np.int8(5)},
            {},
        ),
    ],
)  # fmt: skip
def test_quantized(op, inputs, constants, options):
    compare(*model(op, inputs, constants, opset=13, **options))
