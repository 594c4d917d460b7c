"""Costs against formulas worked out by hand."""

from __future__ import annotations

import json

import pytest
import small_models
import torch

from tersor.errors import InputError
from tersor.ir import Dim, Program, Range, Value, cost
from tersor.ir.costs import function_cost, node_cost
from tersor.ir.opset.__main__ import builtin_ops

B, T = Dim.symbol("batch"), Dim.symbol("length")
DIMS = {"batch": Range(1, 8), "length": Range(1, 512)}


def weight(build, *shape):
    return build.parameter("w", torch.empty(shape, device="meta"))


def bert_base() -> Program:
    """The encoder of BERT-base (Devlin et al. 2019): 12 layers, width 768, 12 heads, hidden 3072, 30522 words."""
    program, width = Program(), 768
    function = program.add_function("main", DIMS)
    ids = function.add_input("input_ids", Value("int64", (B, T)))
    build = function.builder()
    x = build.embedding(ids, weight(build, 30522, width))
    for _ in range(12):
        q, k, v, o = (
            lambda y: build.linear(y, weight(build, width, width), weight(build, width)) for _ in range(4)
        )
        x = build.add(x, o(build.attention(q(x), k(x), v(x), heads=12, kv_heads=12, scale=0.125)))
        up = build.gelu(build.linear(x, weight(build, 3072, width), weight(build, 3072)))
        x = build.add(x, build.linear(up, weight(build, width, 3072), weight(build, width)))
    function.set_outputs({"y": x})
    return program


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (8, 512), (3, 1)])
def test_macs_of_bert_base(batch, length):
    report = cost(bert_base(), {"batch": batch, "length": length})
    tokens, width = batch * length, 768
    linear = 12 * tokens * (4 * width**2 + 2 * width * 3072)
    attention = 12 * batch * 2 * length**2 * width
    assert report.functions["main"].ops["linear"].macs == linear
    assert report.functions["main"].ops["attention"].macs == attention
    assert report.macs == linear + attention
    if (batch, length) == (1, 128):
        assert report.macs == 11_173_625_856
    assert report.functions["main"].ops["linear"].count == 72


def test_parameters_of_bert_base():
    report = cost(bert_base())
    per_layer = 4 * (768 * 768 + 768) + 3072 * 768 + 3072 + 768 * 3072 + 768
    assert report.parameter_bytes == 4 * (30522 * 768 + 12 * per_layer)
    assert report.functions["main"].parameter_bytes == report.parameter_bytes


def test_bytes_moved_of_bert_base():
    rows, tokens, d, h = cost(bert_base(), {"batch": 1, "length": 128}).functions["main"].ops, 128, 768, 3072
    assert rows["embedding"].bytes == 8 * tokens + 2 * 4 * tokens * d
    assert rows["gelu"].bytes == 12 * 2 * 4 * tokens * h
    assert rows["add"].bytes == 24 * 3 * 4 * tokens * d
    assert rows["attention"].bytes == 12 * 4 * 4 * tokens * d
    square = 4 * (2 * tokens * d + d * d + d)
    assert rows["linear"].bytes == 12 * (4 * square + 4 * (2 * tokens * (d + h) + 2 * d * h + d + h))


def test_default_sizes_are_the_largest():
    program = bert_base()
    assert cost(program) == cost(program, {"batch": 8, "length": 512})
    assert cost(program, {"length": 7}).functions["main"].sizes == {"batch": 8, "length": 7}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"length": 513}, "length is 513\n.*1..512"),
        ({"batch": 0}, "batch is 0"),
        ({"depth": 1}, "depth.*\n.*batch, length"),
    ],
)
def test_wrong_sizes(sizes, said):
    with pytest.raises(InputError, match=said):
        cost(bert_base(), sizes)


def test_node_cost_is_symbolic():
    node = bert_base().main.calls("attention")[0]
    assert node_cost(node).macs == 2 * B * T * T * 768
    assert node_cost(node).bytes == 4 * 4 * B * T * 768


def small(*lines) -> Program:
    program = Program()
    function = program.add_function("main", {"n": Range(1, 10)})
    x = function.add_input("x", Value("float32", (Dim.symbol("n"), 25)))  # 1000 bytes at n = 10
    function.set_outputs(lines[0](function.builder(), x))
    return program


@pytest.mark.parametrize(
    ("body", "peak", "at"),
    [
        # x and its result
        (lambda b, x: {"y": b.exp(x)}, 2000, "exp"),
        # x dies after the first of three
        (lambda b, x: {"y": b.exp(b.exp(b.exp(x)))}, 2000, "exp"),
        # x lives to the end
        (lambda b, x: {"y": b.add(b.exp(b.exp(x)), x)}, 3000, "exp_1"),
        # a view of x is no memory, and keeps x
        (lambda b, x: {"y": b.exp(b.reshape(x, shape=(Dim.symbol("n") * 25,)))}, 2000, "exp"),
        (
            lambda b, x: {"y": b.add(b.reshape(b.exp(b.exp(x)), shape=(Dim.symbol("n"), 5, 5)), 1.0)},
            2000,
            "exp",
        ),
        # results live to the end
        (lambda b, x: {"x": x, "y": b.exp(x), "z": b.sin(x)}, 3000, "sin"),
        # parameters are not activations, nor is a view of one
        (
            lambda b, x: {"y": b.mul(x, b.reshape(b.parameter("w", torch.ones(25)), shape=(1, 25)))},
            2000,
            "mul",
        ),
        # a value that nobody reads dies at once
        (lambda b, x: (b.exp(x), b.sin(x), {"y": b.cos(x)})[-1], 2000, "exp"),
        # smaller types
        (lambda b, x: {"y": b.gt(x, 0.0)}, 1250, "gt"),
        # nothing but an input
        (lambda b, x: {"y": x}, 1000, "x"),
    ],
)
def test_peak_of_activations(body, peak, at):
    report = cost(small(body)).functions["main"]
    assert (report.peak_bytes, report.peak_node) == (peak, at)


def test_moves_cost_what_they_move():
    n = Dim.symbol("n")
    program = small(
        lambda b, x: {
            "slice": b.slice(x, dim=1, end=5),
            "view": b.reshape(x, shape=(n * 25,)),
            "rows": b.index_select(b.parameter("t", torch.ones(100, 2)), b.arange(end=3), dim=0),
            "made": b.full(shape=(n,), value=0, dtype="int32"),
            "pair": b.concat((x, x), dim=1),
        }
    )
    rows = cost(program).functions["main"].ops
    assert rows["slice"].bytes == 2 * 10 * 5 * 4
    assert rows["reshape"].bytes == 0
    assert rows["index_select"].bytes == 2 * 3 * 2 * 4 + 3 * 8
    assert rows["full"].bytes == 40
    assert rows["concat"].bytes == 4000


def test_tied_parameters_count_once():
    report = cost(small_models.gpt2())
    stored = sum(p.tensor.nbytes for p in small_models.gpt2().parameters.values())
    assert report.parameter_bytes == stored
    program = small_models.gpt2()
    program.parameters["again"] = program.parameters["wte"]
    program.main.calls("linear")[-1].args[1].target = "again"
    assert cost(program).parameter_bytes == stored == function_cost(program.main).parameter_bytes


def test_sites_add_up_to_the_total():
    report = cost(small_models.bert()).functions["main"]
    assert report.sites["layer.0.up"].macs == 4 * 12 * 16 * 24
    assert (
        sum(row.macs for row in report.sites.values())
        == report.macs
        == sum(r.macs for r in report.ops.values())
    )
    assert sum(row.bytes for row in report.sites.values()) == report.bytes


def test_operations_without_a_site_count_for_their_module():
    program = small(lambda b, x: {"y": b.exp(b.sin(x))})
    program.main.calls("exp")[0].meta["module"] = "layer"
    assert cost(program).functions["main"].sites.keys() == {"layer", ""}


def test_report_of_several_functions():
    program = bert_base()
    second = program.add_function("second", {"n": Range(1, 2)})
    x = second.add_input("x", Value("float32", (Dim.symbol("n"), 4)))
    second.set_outputs({"y": second.builder().linear(x, weight(second.builder(), 3, 4))})
    report = cost(program, {"n": 1, "batch": 1, "length": 1})
    assert report.functions["second"].macs == 12
    assert report.macs == report.functions["main"].macs + 12
    assert report.bytes == report.functions["main"].bytes + report.functions["second"].bytes
    assert report.peak_bytes == report.functions["main"].peak_bytes


def test_report_is_json_and_text():
    report = cost(small_models.llama())
    data = json.loads(json.dumps(report.to_json()))
    assert data["macs"] == report.macs and data["functions"]["main"]["ops"]["linear"]["count"] == 15
    text = str(report)
    assert "at batch 4, length 12" in text and "linear" in text and "peak of activations" in text


def test_every_operation_is_counted_or_free():
    # an operation that multiplies matrices and counts nothing would go unnoticed
    counted = {op.name for op in builtin_ops() if op.macs is not None}
    products = {"linear", "integer_linear", "grouped_integer_linear", "matmul", "conv1d", "conv2d"}
    assert counted == products | {"attention", "integer_attention", "resample"}
