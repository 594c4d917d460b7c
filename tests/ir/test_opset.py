"""Each operation: what its shape rule says is what its reference does, and both refuse the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersor.errors import ProgramError
from tersor.ir import Dim, Program, Range, Value, ops
from tersor.ir.dims import evaluate_shape
from tersor.ir.interpreter import resolve
from tersor.ir.opset.__main__ import builtin_ops
from tersor.ir.program import infer

B, L = Dim.symbol("b"), Dim.symbol("l")
SIZES = ({"b": 3, "l": 5}, {"b": 1, "l": 1}, {"b": 2, "l": 8})


def f32(*shape):
    return Value("float32", shape)


def i64(*shape):
    return Value("int64", shape)


def codes(dtype, *shape):
    return Value(dtype, shape)


def boolean(*shape):
    return Value("bool", shape)


# Operands and attributes by operation; integers index tables of at least 4 rows.
CASES: dict[str, list[tuple[tuple, dict]]] = {
    "add": [((f32(B, L, 4), f32(4)), {}), ((f32(B, 1, 4), f32(1, L, 4)), {}), ((f32(B), 2), {}), ((1.5, i64(L)), {})],
    "sub": [((f32(B, L), f32(B, 1)), {}), ((1.0, f32(B)), {}), ((1, i64(B)), {}), ((f32(), f32(B)), {})],
    "mul": [((f32(B, L), f32()), {}), ((i64(B), 0.5), {}), ((boolean(B), boolean(B)), {}), ((f32(B * L), 3), {})],
    "div": [((f32(B), f32(B)), {}), ((i64(B), i64(B)), {}), ((1, f32(B)), {}), ((1, i64(B)), {})],
    "pow": [((f32(B), 2), {}), ((f32(B), 0.5), {}), ((i64(B), 2), {}), ((2.0, f32(L)), {})],
    "maximum": [((f32(B, L), f32(L)), {}), ((f32(B), 0.0), {}), ((0.5, i64(B)), {}), ((i64(B), 1), {})],
    "minimum": [((f32(B, L), f32(L)), {}), ((f32(B), 0), {}), ((i64(B), 0.5), {})],
    **{name: [((f32(B, L),), {}), ((i64(B),), {})] for name in ("neg", "abs", "floor", "round", "relu", "sqrt", "rsqrt",
       "reciprocal", "exp", "log", "cos", "sin", "tanh", "erf", "sigmoid")},
    **{name: [((f32(B, L),), {}), ((f32(),), {})] for name in ("silu", "gelu", "gelu_tanh", "gelu_sigmoid")},
    "where": [
        ((boolean(B, 1), f32(L), f32(B, L)), {}), ((boolean(B), 0.0, f32(B)), {}), ((boolean(B), 1, 0), {}),
        ((boolean(B), f32(B), float("-inf")), {}), ((boolean(B, L), i64(1), 2.5), {}),
    ],
    "saturate": [((f32(B, L),), {"dtype": "uint8"}), ((f32(),), {"dtype": "int8"})],
    "cast": [((f32(B, L),), {"dtype": "int64"}), ((boolean(B),), {"dtype": "float32"}), ((i64(),), {"dtype": "bool"})],
    **{name: [((i64(B, L), i64(L)), {}), ((f32(B), 0.5), {}), ((2, i64(B)), {})] for name in
       ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: [((boolean(B, L), boolean(L)), {}), ((i64(B), boolean(1)), {})] for name in ("logical_and", "logical_or")},
    "logical_not": [((boolean(B, L),), {}), ((f32(B),), {})],
    "reshape": [((f32(B, L, 4),), {"shape": (B * L, 4)}), ((f32(B, L, 4),), {"shape": (B, L, 2, 2)}),
                ((f32(B * L),), {"shape": (B, 1, L)}), ((f32(4),), {"shape": (2, 2)})],
    "permute": [((f32(B, L, 4),), {"dims": (2, 0, 1)})],
    "expand": [((f32(B, 1, 4),), {"shape": (B, L, 4)}), ((f32(4),), {"shape": (B, L, 4)})],
    "slice": [((f32(B, L, 8),), {"dim": -1, "start": 2, "end": 6}), ((f32(B, 8),), {"dim": 1, "start": 1, "step": 3}),
              ((f32(B, L),), {"dim": 1}), ((f32(9, 4),), {"dim": 0, "end": L}),
              ((f32(B, L),), {"dim": 1, "start": L - 1}),
              ((f32(B, 8),), {"dim": 1, "start": 3, "end": 3})],
    "concat": [(((f32(B, L, 4), f32(B, 1, 4)),), {"dim": 1}), (((i64(B),),), {"dim": 0}),
               (((f32(B, 2), f32(B, 3), f32(B, 2)),), {"dim": -1})],
    "pad": [((f32(B, L),), {"pads": (1, 2)}), ((f32(B, L, 4),), {"pads": (0, 0, 1, 0), "value": 2.0}),
            ((f32(B, 6),), {"pads": (-1, -2)})],
    "index_select": [
        ((f32(4, 6), i64(B, L)), {"dim": 0}),
        ((f32(B, 4), i64()), {"dim": -1}),
        ((f32(4), i64()), {"dim": 0}),
    ],
    "gather": [((f32(B, 4), i64(B, L)), {"dim": 1}), ((f32(B, L, 4), i64(B, L, 1)), {"dim": 2})],
    "cache_update": [((f32(B, 8, 4), f32(B, 3, 4), i64()), {"dim": 1}),
                     ((f32(B, 8, 4), f32(B, 8, 4), i64(8)), {"dim": -2})],
    "scatter": [
        ((f32(B, 4, L), i64(B, 1, L), f32(B, 1, L)), {"dim": 1}),
        *(((f32(5, B), i64(3, B), f32(3, B)), {"dim": 0, "reduce": how}) for how in ("add", "mul", "amax", "amin")),
    ],
    "argsort": [((f32(B, L),), {"dim": -1}), ((i64(B, L),), {"dim": 0, "descending": True})],
    "max_pool2d": [
        ((f32(B, 3, 9, 8),), {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
        ((f32(B, 3, 9, L + 4),), {"kernel": (2, 2), "stride": (1, 1), "dilation": (2, 3)}),
    ],
    "avg_pool2d": [
        ((f32(B, 3, 9, 8),), {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 1), "count_padding": False}),
        ((f32(B, 3, 2 * L, 4),), {"kernel": (2, 2), "stride": (2, 2)}),
    ],
    "resample": [
        ((f32(B, 4, L), i64(6, 2), f32(6, 2)), {"dim": 1}), ((f32(B, 5), i64(L, 3), f32(L, 3)), {"dim": -1}),
    ],
    "arange": [((), {"end": L}), ((), {"end": 7, "dtype": "float32"})],
    "full": [((), {"shape": (B, 3), "value": 1.5, "dtype": "float32"}),
             ((), {"shape": (), "value": True, "dtype": "bool"})],
    "cumsum": [((i64(B, L),), {"dim": 1}), ((boolean(B, L),), {"dim": -1}), ((f32(B),), {"dim": 0})],
    "sum": [((f32(B, L),), {"dims": (1,)}), ((i64(B, L, 2),), {"dims": (0, -1), "keepdim": True}),
            ((boolean(B, L),), {"dims": (1,)})],
    "mean": [((f32(B, L, 4),), {"dims": (-1,)}), ((f32(B, L),), {"dims": (0, 1), "keepdim": True})],
    **{name: [((f32(B, L),), {"dims": (1,), "keepdim": True}), ((i64(B, L),), {"dims": (0, 1)})] for name in
       ("amax", "amin")},
    "argmax": [((f32(B, L),), {"dim": -1}), ((i64(B, L),), {"dim": 0, "keepdim": True})],
    **{name: [((f32(B, L),), {"dim": -1}), ((f32(B, L, 2),), {"dim": 1})] for name in ("softmax", "log_softmax")},
    "linear": [((f32(B, L, 6), f32(4, 6)), {}), ((f32(B, L, 6), f32(4, 6), f32(4)), {}),
               ((f32(6), f32(4, 6), None), {})],
    "matmul": [((f32(B, 2, L, 4), f32(B, 2, 4, L)), {}), ((f32(L, 4), f32(4, 3)), {}),
               ((f32(B, 1, L, 4), f32(2, 4, 3)), {})],
    "layer_norm": [((f32(B, L, 6), f32(6), f32(6)), {"eps": 1e-6}), ((f32(B, 6),), {}), ((f32(B, 6), f32(6)), {})],
    "rms_norm": [((f32(B, L, 6), f32(6)), {"eps": 1e-6}), ((f32(B, 6),), {})],
    "embedding": [((i64(B, L), f32(4, 6)), {}), ((i64(), f32(4, 6)), {})],
    "attention": [
        ((f32(B, L, 8), f32(B, L, 8), f32(B, L, 8)), {"heads": 2, "kv_heads": 2, "scale": 0.5}),
        ((f32(B, L, 8), f32(B, L, 4), f32(B, L, 4), None), {"heads": 4, "kv_heads": 2, "scale": 0.5, "causal": True}),
        ((f32(B, L, 8), f32(B, 3, 4), f32(B, 3, 6), f32(B, 1, 1, 3)), {"heads": 2, "kv_heads": 1, "scale": 1.0}),
        ((f32(B, L, 8), f32(B, L, 8), f32(B, L, 8), boolean(1, 1, L, L)),
         {"heads": 2, "kv_heads": 2, "scale": 0.5, "causal": True, "window": 2}),
        ((f32(B, L, 8), f32(B, L, 4), f32(B, L, 4)),
         {"heads": 4, "kv_heads": 2, "scale": 0.5, "causal": True, "products": "bfloat16"}),
        ((f32(B, L, 8), f32(B, L, 4), f32(B, L, 4)),
         {"heads": 4, "kv_heads": 2, "scale": 0.5, "causal": True, "products": "uint8"}),
        ((f32(B, L, 8), f32(B, L, 4), f32(B, L, 4), boolean(B, 1, 1, L)),
         {"heads": 4, "kv_heads": 2, "scale": 0.5, "causal": True, "softcap": 20.0}),
    ],
    "integer_attention": [
        ((*(codes("uint8", B, L, 8),) * 3, f32(2), f32(2)), {"heads": 2, "kv_heads": 2}),
        ((codes("uint8", B, L, 8), codes("uint8", B, 3, 4), codes("uint8", B, 3, 6), f32(2), f32(1), f32(B, 1, 1, 3)),
         {"heads": 2, "kv_heads": 1, "softcap": 20.0}),
        ((codes("uint8", B, L, 8), *(codes("uint8", B, L, 4),) * 2, f32(4), f32(2)),
         {"heads": 4, "kv_heads": 2, "causal": True, "window": 2}),
    ],
    "quantize": [
        ((f32(B, L, 6), f32()), {"dtype": "int8"}), ((f32(B, L, 6), f32(), f32()), {"dtype": "uint8"}),
        ((f32(B, L, 6), f32(B, L, 1)), {"dtype": "uint8"}), ((f32(4, 6), f32(4), f32(4)), {"dtype": "int8", "axis": 0}),
        ((f32(B, 6), f32(B, 3)), {"dtype": "int8", "group": 2}), ((f32(4), f32()), {"dtype": "int8", "axis": 0}),
        ((f32(B, L, 6), f32(B, L, 1), 128), {"dtype": "uint8"}), ((f32(4), f32(2), 3), {"dtype": "uint8", "group": 2}),
    ],
    "dequantize": [
        ((codes("uint8", B, L, 6), f32(), f32()), {}), ((codes("int8", 4, 6), f32(4)), {"axis": 0}),
        ((codes("int8", B, L), f32(B, 1)), {}), ((codes("int8", 4, 6), f32(4, 2), f32(4, 2)), {"group": 3}),
    ],
    "dynamic_scale": [((f32(B, L, 6),), {}), ((f32(4),), {}), ((f32(B, L, 6),), {"group": 3})],
    "integer_linear": [
        ((codes("uint8", B, L, 6), codes("int8", 4, 6)), {}),
        ((codes("uint8", 6), codes("int8", 4, 6), codes("int32", 4)), {}),
    ],
    "grouped_integer_linear": [
        ((codes("uint8", B, L, 6), codes("int8", 4, 6), f32(B, L, 2)), {}),
        ((codes("uint8", 6), codes("int8", 4, 6), f32(3)), {}),
    ],
    "rotary_embedding": [
        ((f32(B, L, 16), f32(1, L, 8), f32(1, L, 8)), {"heads": 2}),
        ((f32(B, L, 16), f32(B, L, 4), f32(B, L, 4)), {"heads": 2, "interleaved": True}),
    ],
    "conv1d": [((f32(B, 4, 9), f32(6, 4, 3), f32(6)), {"stride": 2, "padding": 1}),
               ((f32(B, 4, L), f32(6, 2, 1)), {"groups": 2}),
               ((f32(B, 4, 2 * L), f32(6, 4, 2), None), {"stride": 2})],
    "conv2d": [((f32(B, 3, 8, 8), f32(6, 3, 4, 4), f32(6)), {"stride": (4, 4)}),
               ((f32(B, 4, 9, 7), f32(4, 1, 3, 3)), {"groups": 4, "padding": (1, 0), "dilation": (2, 1)})],
}  # fmt: skip

# What neither the rule nor the reference accepts.
REFUSED: list[tuple[str, tuple, dict]] = [
    ("add", (f32(B, 3), f32(B, 4)), {}), ("sub", (boolean(B), boolean(B)), {}), ("neg", (boolean(B),), {}),
    ("gelu", (i64(B),), {}), ("cast", (f32(B),), {"dtype": "float31"}), ("logical_and", (boolean(B), True), {}),
    ("where", (f32(B), f32(B), f32(B)), {}), ("reshape", (f32(B, 4),), {"shape": (B, 5)}),
    ("permute", (f32(B, L),), {"dims": (0, 0)}), ("expand", (f32(B, 2),), {"shape": (B, 4)}),
    ("expand", (f32(B, 4),), {"shape": (4,)}), ("slice", (f32(B, L),), {"dim": 2}),
    ("concat", ((f32(B, 2), f32(B, 2, 1)),), {"dim": 1}), ("concat", ((),), {"dim": 0}),
    ("pad", (f32(B, 2),), {"pads": (-2, -1)}), ("pad", (f32(B),), {"pads": (0, 0, 1, 1)}),
    ("gather", (f32(4, 4), i64(4)), {"dim": 0}), ("gather", (f32(4, 4), i64(5, 4)), {"dim": 1}),
    ("scatter", (f32(4, 4), i64(4), f32(4)), {"dim": 0}), ("scatter", (f32(4, 4), i64(2, 4), f32(1, 4)), {"dim": 0}),
    ("scatter", (f32(4, 4), i64(4, 5), f32(4, 5)), {"dim": 0}),
    ("scatter", (f32(4), i64(4), f32(4)), {"dim": 0, "reduce": "mean of"}), ("argsort", (f32(B),), {"dim": 1}),
    ("max_pool2d", (f32(B, 3, 1, 9),), {"kernel": (2, 2), "stride": (2, 2)}),
    ("avg_pool2d", (f32(B, 3, 9, 9),), {"kernel": (2, 2), "stride": (2, 2), "padding": (2, 0)}),
    ("resample", (f32(B, 4), i64(3, 2), f32(2, 2)), {"dim": 1}),
    ("resample", (f32(4), f32(3, 2), f32(3, 2)), {"dim": 0}),
    ("arange", (), {"end": -1}), ("cache_update", (f32(8, 4), f32(9, 4), i64()), {"dim": 0}),
    ("cache_update", (f32(8, 4), f32(2, 4), i64(3)), {"dim": 0}),
    ("cache_update", (f32(8, 4), f32(2, 3), i64()), {"dim": 0}),
    ("cache_update", (f32(8, 4), i64(2, 4), i64()), {"dim": 0}),
    ("cache_update", (f32(8, 4), f32(2, 4), f32()), {"dim": 0}),
    ("full", (), {"shape": (-1,), "value": 0, "dtype": "int64"}), ("cumsum", (f32(B),), {"dim": 1}),
    ("sum", (f32(B, L),), {"dims": (0, 0)}), ("mean", (i64(B),), {"dims": (0,)}), ("argmax", (f32(B),), {"dim": 1}),
    ("softmax", (f32(B),), {"dim": 1}), ("softmax", (i64(B),), {"dim": 0}),
    ("linear", (f32(B, 5), f32(4, 6)), {}), ("linear", (f32(B, 6), f32(4, 6), f32(6)), {}),
    ("linear", (f32(B, 6), Value("float16", (4, 6))), {}), ("matmul", (f32(B, 4), f32(5, 4)), {}),
    ("matmul", (f32(B, 4), Value("float64", (4, 4))), {}), ("layer_norm", (f32(B, 6), f32(5)), {}),
    ("embedding", (f32(B), f32(4, 6)), {}), ("layer_norm", (i64(B, 6),), {}),
    ("attention", (f32(B, L, 8), f32(B, L, 8), f32(B, L, 8)), {"heads": 3, "kv_heads": 3, "scale": 1.0}),
    ("attention", (f32(B, L, 8), f32(B, L, 8), f32(B, L, 8)), {"heads": 4, "kv_heads": 2, "scale": 1.0}),
    ("attention", (f32(B, L, 8),) * 3 + (f32(B, 3, 1, 1),), {"heads": 2, "kv_heads": 2, "scale": 1.0}),
    ("attention", (f32(B, L, 8), f32(B, L, 8), f32(B, 2, 8)), {"heads": 2, "kv_heads": 2, "scale": 1.0}),
    ("rotary_embedding", (f32(B, L, 16), f32(1, L, 10), f32(1, L, 10)), {"heads": 2}),
    ("conv1d", (f32(B, 4, 9), f32(6, 3, 3)), {}), ("conv1d", (f32(B, 4, 2), f32(6, 4, 3)), {}),
    ("conv2d", (f32(B, 3, 8, 8), f32(6, 3, 4, 4), f32(5)), {}),
    ("quantize", (f32(B, 6), f32()), {"dtype": "float31"}), ("quantize", (f32(B, 6), f32(4)), {"dtype": "int8"}),
    ("quantize", (f32(B, 6), f32(4)), {"dtype": "int8", "axis": 1}),
    ("dequantize", (codes("int8", B, 6), f32(B, 4)), {"group": 3}),
    ("integer_linear", (codes("uint8", B, 5), codes("int8", 4, 6)), {}),
    ("dynamic_scale", (f32(B, 6),), {"group": 4}),
    ("grouped_integer_linear", (codes("uint8", B, 6), codes("int8", 4, 6), f32(B, 4)), {}),
]  # fmt: skip


def tensor(value, sizes, generator):
    if isinstance(value, tuple):
        return tuple(tensor(v, sizes, generator) for v in value)
    if not isinstance(value, Value):
        return value
    shape = evaluate_shape(value.shape, sizes)
    high = 2 if value.dtype == "bool" else 4
    return torch.randint(0, high, shape, generator=generator).to(value.torch_dtype)


def names(case):
    return [f"{name}-{i}" for i, (name, *_) in enumerate(case)]


ALL_CASES = [(name, *case) for name, cases in CASES.items() for case in cases]


def test_every_operation_has_cases():
    assert {op.name for op in builtin_ops()} == CASES.keys()


@pytest.mark.parametrize(("name", "operands", "attributes"), ALL_CASES, ids=names(ALL_CASES))
def test_rule_agrees_with_reference(name, operands, attributes):
    op, generator = ops.get(name), torch.Generator().manual_seed(0)
    inferred = infer(op, operands, attributes)
    for sizes in SIZES:
        result = op(*(tensor(o, sizes, generator) for o in operands), **resolve_all(attributes, sizes))
        expected = Value(inferred.dtype, evaluate_shape(inferred.shape, sizes))
        assert Value.of(result) == expected, sizes


@pytest.mark.parametrize(("name", "operands", "attributes"), REFUSED, ids=names(REFUSED))
def test_rule_and_reference_refuse(name, operands, attributes):
    op, generator = ops.get(name), torch.Generator().manual_seed(0)
    with pytest.raises(ProgramError):
        infer(op, operands, attributes)
    sizes = SIZES[0]
    with pytest.raises((RuntimeError, IndexError, TypeError, ValueError, KeyError)):
        op(*(tensor(o, sizes, generator) for o in operands), **resolve_all(attributes, sizes))


@pytest.mark.parametrize(
    ("name", "operands", "attributes"),
    [  # the references would clamp, promote or guess here
        ("slice", (f32(4),), {"dim": 0, "end": 5}),
        ("slice", (f32(4),), {"dim": 0, "start": -1}),
        ("slice", (f32(B, L),), {"dim": 1, "step": 2}),
        ("reshape", (f32(6),), {"shape": (-2, -3)}),
        ("reshape", (f32(B, 6),), {"shape": (B, -1)}),
        ("sum", (f32(B),), {"dims": ()}),
        ("index_select", (f32(4), i64(B)), {"dim": 1}),
        ("embedding", (Value("int32", (B,)), f32(4, 6)), {}),
        ("attention", (f32(2, 3, 8),) * 3 + (i64(1, 1, 3, 3),), {"heads": 2, "kv_heads": 2, "scale": 1.0}),
        ("attention", (f32(2, 3, 8),) * 3, {"heads": 2, "kv_heads": 2, "scale": 1.0, "softcap": 0.0}),
        ("conv1d", (f32(B, 4, L), f32(6, 4, 2)), {"stride": 2}),
        ("add", (f32(B, L), f32(L, B)), {}),
        ("quantize", (i64(B, 6), f32()), {"dtype": "int8"}),
        ("quantize", (f32(B, 6), f32(6)), {"dtype": "int8"}),
        ("quantize", (f32(B, 6), f32(B, 6)), {"dtype": "int8", "axis": 1, "group": 1}),
        ("dequantize", (f32(B, 6), f32()), {}),
        ("dynamic_scale", (i64(B, 6),), {}),
        ("integer_linear", (codes("int8", B, 6), codes("int8", 4, 6)), {}),
        ("grouped_integer_linear", (codes("int8", B, 6), codes("int8", 4, 6), f32(B, 2)), {}),
        ("grouped_integer_linear", (codes("uint8", B, 6), codes("int8", 4, 6), f32(2)), {}),
        ("integer_attention", (*(codes("int8", 2, 3, 8),) * 3, f32(2), f32(2)), {"heads": 2, "kv_heads": 2}),
        ("integer_attention", (*(codes("uint8", 2, 3, 8),) * 3, f32(1), f32(2)), {"heads": 2, "kv_heads": 2}),
    ],
)
def test_rule_is_stricter_than_torch(name, operands, attributes):
    with pytest.raises(ProgramError):
        infer(ops.get(name), operands, attributes)


OF_TWO = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "lt", "ge")
OF_ONE = (
    "neg",
    "abs",
    "floor",
    "relu",
    "sqrt",
    "exp",
    "erf",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "logical_not",
)
DTYPES = ("float64", "float32", "bfloat16", "int64", "int32", "uint8", "bool")


@pytest.mark.parametrize("name", OF_TWO)
def test_promotion_of_two_operands(name):
    tensors = [torch.ones(shape, dtype=Value(d, ()).torch_dtype) for d in DTYPES for shape in ((2,), ())]
    operands = [*tensors, 2, 2.5]
    for x, y in itertools.product(operands, operands):
        if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
            agrees(name, x, y)


@pytest.mark.parametrize("name", OF_ONE)
def test_promotion_of_one_operand(name):
    for dtype in DTYPES:
        agrees(name, torch.ones(2, dtype=Value(dtype, ()).torch_dtype))


def agrees(name, *operands):
    """Rule and reference give the same type and shape; where torch refuses, the rule must too."""
    op = ops.get(name)
    values = tuple(Value.of(x) if isinstance(x, torch.Tensor) else x for x in operands)
    try:
        actual = Value.of(op(*operands))
    except (RuntimeError, TypeError):
        with pytest.raises(ProgramError):
            infer(op, values, {})
        return
    assert infer(op, values, {}) == actual, values


def resolve_all(attributes, sizes):
    return {name: resolve(value, sizes) for name, value in attributes.items()}


# -- meaning, where it is ours and not torch's


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_attention_is_softmax_of_scaled_scores(softcap):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 4), torch.randn(2, 7, 6)
    mask = torch.randn(2, 1, 5, 7)
    got = ops.attention(q, k, v, mask, heads=4, kv_heads=2, scale=0.3, causal=True, window=3, softcap=softcap)
    rows, columns = torch.arange(5)[:, None] + 2, torch.arange(7)[None]
    hidden = (columns > rows) | (columns <= rows - 3)
    for head in range(4):
        group = head // 2
        scores = q[..., 2 * head : 2 * head + 2] @ k[..., 2 * group : 2 * group + 2].mT * 0.3
        scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + mask[:, 0]
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., 3 * group : 3 * group + 3]
        torch.testing.assert_close(got[..., 3 * head : 3 * head + 3], expected)


def test_capped_attention_gives_zeros_where_no_key_is_seen():
    q, seen = torch.randn(1, 3, 4), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    seen[..., 1, :] = False
    got = ops.attention(q, q, q, seen, heads=2, kv_heads=2, scale=1.0, softcap=5.0)
    assert bool((got[0, 1] == 0).all()) and bool((got[0, 0] != 0).all())


def test_attention_boolean_mask_is_true_where_seen():
    torch.manual_seed(0)
    q = torch.randn(1, 3, 4)
    seen = torch.tensor([True, False, True]).reshape(1, 1, 1, 3)
    got = ops.attention(q, q, q, seen, heads=1, kv_heads=1, scale=1.0)
    kept = q[:, [0, 2]]
    torch.testing.assert_close(got, (q @ kept.mT).softmax(-1) @ kept)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_turns_pairs(interleaved):
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 12), torch.randn(1, 3, 2)
    tables = [torch.repeat_interleave(f(angle), 2, -1) if interleaved else f(angle).repeat(1, 1, 2)
              for f in (torch.cos, torch.sin)]  # fmt: skip
    got = ops.rotary_embedding(x, *tables, heads=2, interleaved=interleaved)
    for head in range(2):
        part, turned = x[..., 6 * head : 6 * head + 6], got[..., 6 * head : 6 * head + 6]
        torch.testing.assert_close(turned[..., 4:], part[..., 4:])
        for pair in range(2):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 2)
            z = torch.complex(part[..., i], part[..., j]) * torch.polar(torch.ones(1, 3), angle[..., pair])
            torch.testing.assert_close(turned[..., i], z.real)
            torch.testing.assert_close(turned[..., j], z.imag)


def test_numbers_keep_full_precision_beside_float64():
    x = torch.tensor([3.0], dtype=torch.float64)
    assert ops.sub(0.1, x).item() == 0.1 - 3.0
    assert ops.div(0.1, x).item() == 0.1 / 3.0
    assert ops.maximum(x, 3.1).item() == 3.1


def test_maximum_keeps_nan():
    x = torch.tensor([float("nan"), 1.0])
    assert ops.maximum(x, 2.0).isnan().tolist() == [True, False]


def test_macs():
    def macs(name, *operands, **attributes):
        op = ops.get(name)
        return op.macs(infer(op, operands, attributes), *operands, **attributes)

    assert macs("linear", f32(B, L, 6), f32(4, 6), None) == B * L * 24
    assert macs("matmul", f32(B, L, 6), f32(6, 5)) == B * L * 30
    heads = {"heads": 4, "kv_heads": 2, "scale": 1.0}
    assert macs("attention", f32(B, L, 8), f32(B, 3, 4), f32(B, 3, 6), **heads) == B * L * 3 * 4 * (2 + 3)
    assert macs("conv2d", f32(2, 3, 8, 8), f32(6, 3, 4, 4), stride=(4, 4)) == 2 * 6 * 4 * 48
    assert macs("conv1d", f32(2, 4, 9), f32(6, 2, 3), groups=2) == 2 * 6 * 7 * 6


def test_codes_round_half_to_even_and_saturate():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0, -300.0, 0.0])
    got = ops.quantize(x, torch.tensor(1.0), torch.tensor(10.0), dtype="uint8")
    assert got.tolist() == [10, 12, 12, 10, 255, 0, 10]
    got = ops.quantize(x, torch.tensor(1.0), dtype="int8")
    assert got.tolist() == [0, 2, 2, 0, 127, -128, 0]


def test_codes_come_back_within_half_a_step():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    for scale, form in [(torch.tensor(0.05), {}), (torch.rand(5) / 20 + 0.03, {"axis": 0}),
                        (torch.rand(5, 4) / 20 + 0.03, {"group": 3}), (ops.dynamic_scale(x), {})]:  # fmt: skip
        back = ops.dequantize(ops.quantize(x, scale, dtype="int8", **form), scale, **form)
        step = scale.repeat_interleave(3, -1) if "group" in form else scale.reshape(-1, 1)
        assert ((x - back).abs() <= step * 0.5001).all()


def test_rows_of_zeros_have_a_scale():
    assert ops.dynamic_scale(torch.zeros(2, 4)).tolist() == [[1.0], [1.0]]
    assert ops.dynamic_scale(torch.tensor([[0.0, 0.0, 254.0, -1.0]]), group=2).tolist() == [[1.0, 2.0]]


def test_integer_products_are_exact():
    codes = torch.full((1, 66000), 255, dtype=torch.uint8)
    weight = torch.full((1, 66000), 127, dtype=torch.int8)
    assert ops.integer_linear(codes, weight, torch.tensor([-1])).item() == 66000 * 255 * 127 - 1


def test_sums_of_groups_are_exact():
    """Of scales so different that f32 would lose the second group behind the first."""
    codes = torch.full((1, 4096), 255, dtype=torch.uint8)
    weight = torch.full((1, 4096), 127, dtype=torch.int8)
    weight[0, :2048:2] = -127  # the first group's sum is zero
    scale = torch.tensor([[1e12, 1.0]])
    assert ops.grouped_integer_linear(codes, weight, scale).item() == 2048 * 127 * 127


@pytest.mark.parametrize(
    ("name", "operands", "attributes"),
    [
        (name, *case)
        for name in ("quantize", "dequantize", "dynamic_scale", "grouped_integer_linear")
        for case in CASES[name]
    ],
)
def test_decompositions_equal_the_references(name, operands, attributes):
    program, generator = Program(), torch.Generator().manual_seed(0)
    function = program.add_function("main", {"b": Range(1, 8), "l": Range(1, 8)})
    inputs = [
        function.add_input(f"x{i}", value) if isinstance(value, Value) else value
        for i, value in enumerate(operands)
    ]
    op = ops.get(name)
    function.set_outputs({"out": op.decompose(function.builder(), *inputs, **attributes)})
    given = [tensor(value, SIZES[0], generator) for value in operands]
    given = [x * 0.37 + 0.1 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    expected = op(*given, **attributes)
    got = program(**{f"x{i}": x for i, x in enumerate(given) if isinstance(x, torch.Tensor)})["out"]
    rounding = 1e-6 if "linear" in name else 0.0  # of sums
    torch.testing.assert_close(got, expected, rtol=rounding, atol=0)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_products_in_16_bits_round_what_they_multiply(dtype, largest):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 8) for _ in range(3))
    forms = {"heads": 2, "kv_heads": 2, "scale": 0.5, "causal": True}
    narrow = str(dtype).removeprefix("torch.")
    exact, rounded = (ops.attention(q, k, v, **forms, products=p) for p in ("float32", narrow))
    assert 1e-5 < (exact - rounded).abs().max() < largest
    # the first query sees one key, whose value alone is rounded
    torch.testing.assert_close(rounded[:, 0], v[:, 0].to(dtype).float())


def test_products_in_fp16_limit_what_they_multiply():
    q, v = torch.full((1, 1, 2), 1e5), torch.full((1, 1, 2), -1e6)
    got = ops.attention(q, torch.ones(1, 1, 2), v, heads=1, kv_heads=1, scale=1.0, products="float16")
    torch.testing.assert_close(got, torch.full((1, 1, 2), -65504.0))
