"""Programs written as ONNX files: every operation by itself in onnxruntime, and the files themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

import tersor  # noqa: E402
from tersor import frontends  # noqa: E402
from tersor.errors import InputError, ProgramError, UnsupportedOpError  # noqa: E402
from tersor.frontends.onnx.export import exports, to_onnx  # noqa: E402
from tersor.frontends.onnx.export.table import EXPORTERS  # noqa: E402
from tersor.ir import Dim, Program, Range, Value, ops, register_op, sites  # noqa: E402
from tersor.ir.opset.__main__ import builtin_ops  # noqa: E402
from tersor.ir.samples import sample_inputs  # noqa: E402

B, T = Dim.symbol("batch"), Dim.symbol("length")
DIMS = {"batch": Range(1, 4), "length": Range(1, 9)}
Body = Callable[..., object]


def session(model: object) -> runtime.InferenceSession:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_there(model: object, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    there = session(model)
    known = {i.name for i in there.get_inputs()}
    results = there.run(None, {name: x.numpy() for name, x in inputs.items() if name in known})
    return dict(zip((o.name for o in there.get_outputs()), results, strict=True))


def close(program: Program, model: object, inputs: Mapping[str, torch.Tensor]) -> None:
    found = run_there(model, inputs)
    expected = program(**inputs)
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        got = torch.from_numpy(found[name])
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        if wanted.is_floating_point():
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(got, wanted), name


def program_of(body: Body, inputs: Mapping[str, Value]) -> Program:
    """One function with these inputs; ``body(build, *nodes)`` gives its result."""
    program = Program()
    names = {s for v in inputs.values() for d in v.shape if isinstance(d, Dim) for s in d.symbols}
    function = program.add_function("main", {n: r for n, r in DIMS.items() if n in names})
    nodes = [function.add_input(name, value) for name, value in inputs.items()]
    function.set_outputs({"y": body(function.builder(), *nodes)})
    return program


def f32(*shape: int | Dim) -> Value:
    return Value("float32", shape)


def i64(*shape: int | Dim) -> Value:
    return Value("int64", shape)


def bits(*shape: int | Dim) -> Value:
    return Value("bool", shape)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def codes(*shape: int) -> torch.Tensor:
    return (weight(*shape) * 100).to(torch.int8)


def _integer_attention(kv_heads: int = 4, **options: object) -> Body:
    def body(b, q, k, v, mask=None):
        scales = (b.parameter("score", weight(4).abs() * 1e-4), b.parameter("value", weight(kv_heads).abs()))
        return b.integer_attention(q, k, v, *scales, mask, heads=4, kv_heads=kv_heads, **options)

    return body


def _attention(**options: object) -> Body:
    attributes = {"heads": 4, "kv_heads": 4, "scale": 0.3, **options}
    return lambda b, q, k, v, mask=None: b.attention(q, k, v, mask, **attributes)


Q, KV = f32(B, T, 32), f32(B, T, 16)
ROTATED = [f32(B, T, 32), f32(1, T, 6), f32(1, T, 6)]
CASES: dict[str, list[tuple[Body, list[Value]]]] = {
    **{
        name: [(lambda b, x, name=name: b.emit(name, x), [f32(B, T, 3)])]
        for name in (
            "neg", "abs", "floor", "round", "relu", "reciprocal", "exp", "cos", "sin", "tanh", "erf", "sigmoid", "silu",
            "gelu", "gelu_tanh", "gelu_sigmoid",
        )
    },
    **{
        name: [(lambda b, x, name=name: b.emit(name, b.add(b.abs(x), 0.1)), [f32(B, T, 3)])]
        for name in ("sqrt", "rsqrt", "log")
    },
    **{
        name: [
            (lambda b, x, y, name=name: b.emit(name, x, y), [f32(B, T, 3), f32(T, 1)]),
            (lambda b, x, name=name: b.emit(name, x, 0.5), [f32(B, 3)]),
            (lambda b, x, name=name: b.emit(name, 2, x), [f32(B, 3)]),
            (lambda b, x, y, name=name: b.emit(name, x, y), [i64(B, 3), f32(B, 1)]),
        ]
        for name in ("add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "pow": [
        (lambda b, x: b.pow(x, 2.0), [f32(B, 3)]),
        (lambda b, x: b.pow(b.abs(x), -0.5), [f32(B, 3)]),
        (lambda b, x: b.pow(2.0, x), [f32(B, 3)]),
        (lambda b, x: b.pow(x, 3), [i64(B, 3)]),
    ],
    "logical_and": [(lambda b, x, y: b.logical_and(x, y), [bits(B, 3), bits(3)])],
    "logical_or": [(lambda b, x, y: b.logical_or(x, y), [bits(B, 3), i64(3)])],
    "logical_not": [(lambda b, x: b.logical_not(x), [v]) for v in (bits(B, 3), i64(B, 3))],
    "where": [
        (lambda b, c, x: b.where(c, x, 0.25), [bits(B, T), f32(B, T)]),
        (lambda b, c, x, y: b.where(c, x, y), [bits(T), i64(B, T), f32(B, 1)]),
        (lambda b, c, x: b.where(c, x, -1), [bits(B, T), i64(B, T)]),
    ],
    "cast": [
        (lambda b, x, to=to: b.cast(b.mul(x, 3.7), dtype=to), [f32(B, 3)])
        for to in ("int64", "int32", "bool", "float64", "float32")
    ],
    "reshape": [
        (lambda b, x: b.reshape(x, shape=(B, T, 2, 3)), [f32(B, T, 6)]),
        (lambda b, x: b.reshape(x, shape=(B * T, 6)), [f32(B, T, 6)]),
        (lambda b, x: b.reshape(x, shape=(T, 6, B)), [f32(B, T, 6)]),
        (lambda b, x: b.reshape(x, shape=(1, B, 1, T, 6)), [f32(B, T, 6)]),
        (lambda b, x: b.reshape(x, shape=(6, 4)), [f32(2, 3, 4)]),
        (lambda b, x: b.reshape(x, shape=(4, 0)), [f32(0, 3)]),
    ],
    "permute": [(lambda b, x: b.permute(x, dims=(2, 0, 1)), [f32(B, T, 3)])],
    "expand": [
        (lambda b, x, y: b.add(b.expand(x, shape=(B, T, 3)), y), [f32(B, 1, 3), f32(T, 1)]),
        (lambda b, x, y: b.add(b.expand(x, shape=(4, B, T)), y), [f32(B, 1), f32(T)]),
    ],
    "slice": [
        (lambda b, x: b.slice(x, dim=1, start=1, end=3), [f32(B, 5)]),
        (lambda b, x: b.slice(x, dim=-1, start=1, end=None, step=2), [f32(B, 5)]),
        (lambda b, x, y: b.slice(x, dim=0, start=0, end=T), [f32(9, 2), f32(T)]),
        (lambda b, x: b.slice(x, dim=1, start=T - 1, end=T), [f32(B, T)]),
    ],
    "concat": [
        (lambda b, x, y: b.concat((x, y, x), dim=1), [f32(B, T), f32(B, 2)]),
        (lambda b, x, y: b.concat((x, y), dim=-1), [bits(B, 3), bits(B, T)]),
    ],
    "pad": [
        (lambda b, x: b.pad(x, pads=(1, 2)), [f32(B, T)]),
        (lambda b, x: b.pad(x, pads=(0, 1, 2, 0), value=-1.5), [f32(B, T, 3)]),
        (lambda b, x: b.pad(x, pads=(1, -1), value=7), [i64(B, 4)]),
    ],
    "index_select": [(lambda b, x, i: b.index_select(x, i, dim=1), [f32(B, 5, 2), i64(T, 2)])],
    "gather": [(lambda b, x, i: b.gather(x, i, dim=1), [f32(B, 5), i64(B, T)])],
    "arange": [
        (lambda b, x: b.add(b.arange(end=T), x), [i64(T)]),
        (lambda b, x: b.mul(b.arange(end=2 * T + 1, dtype="float32"), x), [f32(T, 1)]),
        (lambda b, x: b.add(b.arange(end=4), x), [i64(B, 4)]),
    ],
    "full": [
        (lambda b, x: b.add(b.full(shape=(B, T), value=0.5, dtype="float32"), x), [f32(B, T)]),
        (lambda b, x: b.add(b.full(shape=(), value=B * T - 3, dtype="int64"), x), [i64(B, T)]),
        (lambda b, x: b.logical_and(b.full(shape=(3,), value=True, dtype="bool"), x), [bits(B, 3)]),
    ],
    "cache_update": [
        (lambda b, s, x, p: b.cache_update(s, b.mul(x, 2.0), b.sum(b.mul(p, 0), dims=(0,)), dim=1),
         [f32(2, 9, 3), f32(2, T, 3), i64(4)]),
        (lambda b, s, x: b.cache_update(s, x, b.arange(end=T), dim=-1), [f32(2, 3, 9), f32(2, 3, T)]),
    ],
    "integer_linear": [
        (lambda b, x, c=c: b.integer_linear(x, b.parameter("w", codes(5, 6)), *(b.parameter(*p) for p in c)),
         [Value("uint8", (B, 6))])
        for c in ([], [("b", codes(5).to(torch.int32))])
    ],
    "cumsum": [(lambda b, x: b.cumsum(x, dim=-1), [v]) for v in (f32(B, T), i64(B, T), bits(B, T))],
    "linear": [
        (lambda b, x: b.linear(x, b.parameter("w", weight(5, 6)), b.parameter("b", weight(5))), [f32(B, T, 6)]),
        (lambda b, x: b.linear(x, b.parameter("w", weight(5, 6))), [f32(B, 6)]),
        (lambda b, x, w: b.linear(x, w), [f32(B, 6), f32(5, 6)]),
    ],
    "matmul": [
        (lambda b, x, y: b.matmul(x, y), [f32(B, 3, T, 4), f32(B, 1, 4, T)]),
        (lambda b, x, y: b.matmul(x, y), [f32(B, T, 4), f32(4, 3)]),
    ],
    "layer_norm": [
        (
            lambda b, x: b.layer_norm(x, b.parameter("w", weight(6)), b.parameter("b", weight(6)), eps=1e-12),
            [f32(B, T, 6)],
        ),
        (lambda b, x: b.layer_norm(x, b.parameter("w", weight(6)), eps=1e-3), [f32(B, 6)]),
        (lambda b, x: b.layer_norm(x, None, b.parameter("b", weight(6))), [f32(B, 6)]),
        (lambda b, x: b.layer_norm(x), [f32(B, T, 6)]),
    ],
    "rms_norm": [
        (lambda b, x: b.rms_norm(x, b.parameter("w", weight(6)), eps=1e-5), [f32(B, T, 6)]),
        (lambda b, x: b.rms_norm(x), [f32(B, T, 6)]),
    ],
    "embedding": [(lambda b, i: b.embedding(i, b.parameter("w", weight(7, 6))), [i64(B, T)])],
    "attention": [
        (_attention(), [Q, Q, Q]),
        (_attention(scale=1.0), [f32(2, 5, 32), f32(2, 3, 32), f32(2, 3, 32)]),
        (_attention(heads=1, kv_heads=1), [Q, Q, Q]),
        (_attention(kv_heads=2, causal=True), [Q, KV, KV]),
        (_attention(causal=True), [f32(B, 2, 32), f32(B, 5, 32), f32(B, 5, 32)]),
        (_attention(causal=True), [f32(B, 5, 32), f32(B, 2, 32), f32(B, 2, 32)]),
        (_attention(causal=True, window=3), [Q, Q, Q]),
        (_attention(window=2), [Q, Q, Q]),
        (_attention(softcap=0.5, causal=True), [Q, Q, Q]),
        (_attention(), [Q, Q, Q, bits(B, 1, 1, T)]),
        (_attention(causal=True), [Q, Q, Q, bits(B, 4, T, T)]),
        (_attention(causal=True), [Q, Q, Q, f32(1, 4, T, T)]),
        (lambda b, q, k, v: _attention()(b, q, k, v, b.parameter("bias", weight(1, 4, 5, 5))), [f32(2, 5, 32)] * 3),
        (_attention(), [f32(B, T, 24), f32(B, T, 24), f32(B, T, 8)]),
        (_attention(products="uint8", kv_heads=2, causal=True), [Q, KV, KV, bits(B, 1, 1, T)]),
    ],
    "integer_attention": [
        (_integer_attention(), [*[Value("uint8", (B, T, 32))] * 3]),
        (_integer_attention(2, softcap=0.5, causal=True), [Value("uint8", (B, T, n)) for n in (32, 16, 8)]),
        (_integer_attention(), [*[Value("uint8", (B, T, 32))] * 3, bits(B, 1, 1, T)]),
    ],
    "rotary_embedding": [
        (lambda b, x, c, s, i=i: b.rotary_embedding(x, c, s, heads=4, interleaved=i), ROTATED) for i in (False, True)
    ] + [(lambda b, x, c, s: b.rotary_embedding(x, c, s, heads=4), [f32(B, T, 32), f32(B, T, 8), f32(B, T, 8)])],
    "conv1d": [
        (
            lambda b, x: b.conv1d(x, b.parameter("w", weight(6, 4, 3)), b.parameter("b", weight(6)), padding=1),
            [f32(B, 4, T)],
        ),
        (lambda b, x: b.conv1d(x, b.parameter("w", weight(6, 2, 3)), stride=2, dilation=2, groups=2), [f32(B, 4, 11)]),
    ],
    "conv2d": [
        (
            lambda b, x: b.conv2d(x, b.parameter("w", weight(6, 1, 2, 3)), b.parameter("b", weight(6)),
                                  stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=3),
            [f32(B, 3, 8, 9)],
        ),
    ],
    **{
        name: [
            (lambda b, x, name=name: b.emit(name, x, dims=(1,), keepdim=True), [f32(B, T, 3)]),
            (lambda b, x, name=name: b.emit(name, x, dims=(0, -1)), [f32(B, T, 3)]),
        ]
        for name in ("sum", "mean", "amax", "amin")
    },
    "argmax": [(lambda b, x: b.argmax(x, dim=-1), [v]) for v in (f32(B, T), i64(B, T))],
    "argsort": [
        (lambda b, x: b.argsort(x, dim=-1), [f32(B, T)]),
        (lambda b, x: b.argsort(x, dim=0, descending=True), [i64(B, T)]),
    ],
    "scatter": [
        (lambda b, x, how=how: b.scatter(x, b.argsort(x, dim=1), b.mul(x, 2.0), dim=1, reduce=how), [f32(B, T, 3)])
        for how in ("none", "add", "mul", "amax", "amin")
    ],
    "max_pool2d": [
        (lambda b, x: b.max_pool2d(x, kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
         [f32(B, 3, 8, 9)]),
    ],
    "avg_pool2d": [
        (lambda b, x, count=count: b.avg_pool2d(x, kernel=(3, 2), stride=(2, 1), padding=(1, 0), count_padding=count),
         [f32(B, 3, 8, 9)])
        for count in (True, False)
    ],
    "resample": [
        (lambda b, x: b.resample(x, b.parameter("p", torch.tensor([[0, 1], [2, 2], [3, 1]])),
                                 b.parameter("w", weight(3, 2)), dim=-2), [f32(B, 4, T)]),
    ],
    "quantize": [
        (lambda b, x, d=d, z=z, f=f, s=s: b.quantize(x, b.parameter("s", s), z and b.parameter("z", z), dtype=d, **f),
         [f32(B, T, 3)])
        for d, s, z, f in (
            ("uint8", torch.tensor(2.0**-5), torch.tensor(117.0), {}),
            ("int8", torch.tensor([2.0**-5, 2.0**-6, 2.0**-4]), None, {"axis": -1}),
            ("int8", torch.full((1, 1, 1), 2.0**-5), torch.tensor(3.0), {}),
        )
    ],
    "dequantize": [
        (lambda b, x, s=s, z=z, f=f: b.dequantize(b.quantize(x, b.parameter("q", torch.tensor(2.0**-5)), dtype="int8"),
                                                  b.parameter("s", s), z, **f), [f32(B, T, 3)])
        for s, z, f in (
            (torch.tensor(0.1), 3, {}), (torch.tensor([0.1, 0.2, 0.3]), None, {"axis": 2}),
            (torch.full((1, 1, 1), 0.1), 3, {}),
        )
    ],
    "softmax": [(lambda b, x: b.softmax(x, dim=1), [f32(B, T, 3)])],
    "log_softmax": [(lambda b, x: b.log_softmax(x, dim=-1), [f32(B, T)])],
}  # fmt: skip
CASES["sum"] += [(lambda b, x: b.sum(x, dims=(1,)), [v]) for v in (i64(B, T), bits(B, T))]
CASES["amax"] += [(lambda b, x: b.amax(x, dims=(1,), keepdim=True), [v]) for v in (i64(B, T), bits(B, T))]
for _name in ("add", "mul", "maximum", "minimum", "eq", "lt"):
    CASES[_name].append((lambda b, x, y, name=_name: b.emit(name, x, y), [bits(B, 3), bits(3)]))


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("name", CASES)
def test_operation(name: str, opset: int) -> None:
    """At the smallest and the largest size of each dimension and one between."""
    for body, values in CASES[name]:
        program = program_of(body, {f"x{i}": v for i, v in enumerate(values)})
        model = to_onnx(program, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        for size in (1, 3, 9) if program.main.dims else (1,):
            sizes = {n: min(size, r.max) for n, r in program.main.dims.items()}
            close(program, model, sample_inputs(program.main, sizes))


def test_every_operation_can_be_written() -> None:
    """Whoever adds an operation to the dialect adds an exporter (frontends/onnx/export) and a case here."""
    own = [op for op in builtin_ops() if op.decompose is None]
    assert not [op.name for op in own if op.name not in EXPORTERS], "no exporter and no decomposition"
    assert not [op.name for op in builtin_ops() if op.name in EXPORTERS and op.name not in CASES], "no case"
    assert not [name for name in EXPORTERS if name not in ops], "no such operation"


def _layer() -> Program:
    """Two products that share a weight, one of them as a table; a norm without a weight; named sites."""
    program = Program()
    function = program.add_function("main", DIMS)
    ids = function.add_input("ids", i64(B, T))
    build = function.builder()
    table = build.parameter("wte.weight", weight(12, 8))
    x = build.embedding(ids, table, site="wte")
    x = build.linear(
        build.layer_norm(x, site="norm"), build.parameter("up.weight", weight(8, 8)), site="mlp.up"
    )
    logits = build.linear(build.gelu(x, site="mlp.act"), table, site="lm_head")
    function.set_outputs({"hidden": x, "logits": logits, "again": logits, "ids.seen": ids})
    return program


def test_names_and_places_come_back() -> None:
    program = _layer()
    model = to_onnx(program)
    assert [i.name for i in model.graph.input] == ["ids"]
    assert [o.name for o in model.graph.output] == ["hidden", "logits", "again", "ids.seen"]
    assert {t.name: list(t.dims) for t in model.graph.initializer} == {
        "wte.weight": [12, 8],
        "up.weight": [8, 8],
    }
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "length"]
    assert (model.producer_name, model.producer_version) == ("tersor", tersor.__version__)
    assert "/mlp/up/MatMul" in [n.name for n in model.graph.node]
    again = frontends.capture(model)
    assert again.digest() == program.digest() and again.main.dims == DIMS
    assert [s.name for s in sites(again)] == [s.name for s in sites(program)]
    assert set(again.parameters) == {"wte.weight", "up.weight"}
    ids = {"ids": torch.tensor([[3, 11, 0]])}
    close(program, model, ids)


def test_what_the_file_tells_of_dimensions_may_be_overruled_or_damaged() -> None:
    model = to_onnx(_layer())
    dynamic = {"ids": {1: ("tokens", 2, 5)}}
    assert frontends.capture(model, dynamic=dynamic).main.dims == {
        "batch": Range(1, 4),
        "tokens": Range(2, 5),
    }
    for text in (
        "",
        "[1]",
        '{"batch": 3}',
        '{"batch": [4, 1]}',
        '{"batch": [true, 9]}',
        '{"batch": ["a", 2]}',
    ):
        model.metadata_props[0].value = text
        assert frontends.capture(model).main.dims["batch"] == Range(1, 8)


def test_parameters_that_nothing_reads_are_no_weights() -> None:
    program = Program()
    function = program.add_function("main", {})
    x = function.add_input("x", Value("float32", (2, 3)))
    build = function.builder()
    build.parameter("left", torch.ones(2, 3, 4))
    function.set_outputs({"y": build.neg(x)})
    assert run_there(to_onnx(program), {"x": torch.ones(2, 3)})["y"].tolist() == [[-1.0] * 3] * 2


def test_tied_parameters_are_stored_once() -> None:
    program = _layer()
    shared = program.parameters["wte.weight"].tensor
    head = program.main.calls("linear")[-1]
    head.args = (head.args[0], program.main.builder(before=head).parameter("lm_head.weight", shared))
    model = to_onnx(program)
    assert sum(list(t.dims) == [12, 8] for t in model.graph.initializer) == 1
    close(program, model, {"ids": torch.tensor([[1, 2]])})


def test_tensors_beside_the_model(tmp_path: Path) -> None:
    program = program_of(
        lambda b, x: b.linear(x, b.parameter("w", weight(40, 16)), b.parameter("b", weight(40))),
        {"x": f32(B, 16)},
    )
    path = tmp_path / "model.onnx"
    assert to_onnx(program, path, external_data=True) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 2000 < (tmp_path / "model.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    close(program, path, {"x": torch.randn(2, 16)})
    assert frontends.capture(path).digest() == program.digest()
    to_onnx(program, path)  # replaces the file
    assert path.stat().st_size > 2000
    close(program, path, {"x": torch.randn(2, 16)})


def test_large_models_go_beside_the_file_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.frontends.onnx.export.files.LARGEST", 1000)
    program = program_of(lambda b, x: b.linear(x, b.parameter("w", weight(40, 16))), {"x": f32(B, 16)})
    to_onnx(program, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").is_file()
    for arguments in ({}, {"path": tmp_path / "whole.onnx", "external_data": False}):
        with pytest.raises(InputError, match="external_data=True"):
            to_onnx(program, **arguments)
    assert not (tmp_path / "whole.onnx").exists()


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("before")

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tersor.frontends.onnx.export.files._write_tensors", fail)
    with pytest.raises(InputError, match="no space left"):
        to_onnx(_layer(), path, external_data=True)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"opset": 17}, "18 to 23"),
        ({"opset": True}, "18 to 23"),
        ({"external_data": True}, "give a path"),
        ({"path": "model.bin"}, "does not end in .onnx"),
        ({"path": "no/such/model.onnx"}, "no folder"),
        ({"function": "decode"}, "no function called 'decode'"),
    ],
)
def test_unusable_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(_layer(), **arguments)


def test_a_program_of_several_functions_is_written_one_by_one() -> None:
    program = _layer()
    other = program.add_function("head", {"batch": Range(1, 4)})
    x = other.add_input("x", f32(B, 8))
    build = other.builder()
    other.set_outputs({"y": build.linear(x, build.read("up.weight"))})
    with pytest.raises(InputError, match="main, head"):
        to_onnx(program)
    model = to_onnx(program, function="head")
    assert [t.name for t in model.graph.initializer] == ["up.weight"]
    x = torch.randn(2, 8)
    found = run_there(model, {"x": x})["y"]
    torch.testing.assert_close(torch.from_numpy(found), x @ weight(8, 8).T)


def test_a_state_goes_in_and_comes_out() -> None:
    program = Program()
    function = program.add_function("step", {"batch": Range(1, 4)})
    x, position = function.add_input("x", f32(1, B)), function.add_input("position", i64())
    keys, seen = function.add_state("keys", f32(1, 9)), function.add_state("seen", i64())
    build = function.builder()
    new = build.cache_update(keys, x, position, dim=1)
    function.set_outputs({"y": build.sum(new, dims=(1,)), "seen": build.add(seen, 0)}, {"keys": new})
    model = to_onnx(program)
    onnx.checker.check_model(model, full_check=True)
    given = {
        "x": torch.ones(1, 2),
        "position": torch.tensor(3),
        "keys": torch.zeros(1, 9),
        "seen_1": torch.tensor(5),
    }
    found = run_there(model, given)
    assert list(found) == ["y", "seen", "keys.next", "seen.next"]
    assert found["keys.next"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 0]] and found["y"].tolist() == [2]
    assert found["seen.next"] == found["seen"] == 5


def test_one_name_for_two_values() -> None:
    program = program_of(lambda b, x: b.mul(x, b.parameter("y", weight(3))), {"x": f32(B, 3)})
    program.main.set_outputs({"x": program.main.results[0], "y": program.main.input_nodes[0]})
    model = to_onnx(program)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(2, 3)
    found = run_there(model, {"x": x})
    torch.testing.assert_close(torch.from_numpy(found["x_1"]), x * weight(3))
    torch.testing.assert_close(torch.from_numpy(found["y"]), x)


# -- operations of third parties


@pytest.fixture
def mine():
    """Three operations: with a decomposition, with an exporter, and with neither."""

    def twice(x):
        """2 x."""
        return x + x

    def capped(x, *, most: float = 1.0):
        """min(x, most)."""
        return x.clamp(max=most)

    register_op("test_export.twice", twice, decompose=lambda build, x: build.mul(x, 2.0))
    register_op("test_export.capped", capped, infer=lambda x, *, most=1.0: x)
    register_op("test_export.alone", lambda x: x, infer=lambda x: x)

    @exports("test_export.capped")
    def _capped(e):
        return e.emit("Min", e.operand(0), e.constant(e.attribute("most"), e.result.dtype))

    yield
    for name in ("twice", "capped", "alone"):
        del ops._ops[f"test_export.{name}"]
    del EXPORTERS["test_export.capped"]


def test_operations_of_third_parties(mine: None) -> None:
    program = program_of(
        lambda b, x: b.emit("test_export.capped", b.emit("test_export.twice", x), most=0.5), {"x": f32(B, 3)}
    )
    close(program, to_onnx(program), {"x": torch.randn(2, 3)})
    with pytest.raises(ProgramError, match="has an exporter"):
        exports("test_export.capped")(lambda e: "")


def test_what_an_exporter_overlooks_is_refused(mine: None) -> None:
    program = program_of(lambda b, x: b.emit("test_export.twice", x), {"x": f32(B, 3)})
    exports("test_export.twice")(lambda e: e.emit("Add", e.operand(0), e.operand(0)))
    try:
        close(program, to_onnx(program), {"x": torch.randn(2, 3)})
        capped = program_of(lambda b, x: b.emit("test_export.capped", x, most=0.5), {"x": f32(B, 3)})
        EXPORTERS["test_export.capped"] = [
            (18, lambda e: e.emit("Min", e.operand(0), e.constant(1.0, "float32")))
        ]
        with pytest.raises(UnsupportedOpError, match="does not know most"):
            to_onnx(capped)
    finally:
        del EXPORTERS["test_export.twice"]


def test_everything_unsupported_is_reported_at_once(mine: None) -> None:
    def body(b, x):
        x = b.emit("test_export.alone", b.emit("test_export.alone", x), site="there")
        return b.cast(b.cast(x, dtype="int64"), dtype="float32")

    program = program_of(body, {"x": f32(B, 3)})
    register_op("test_export.other", lambda x: x, infer=lambda x: x)
    try:
        build = program.main.builder(before=program.main.calls("cast")[0])
        first = program.main.calls("test_export.alone")[1]
        program.main.calls("cast")[0].args = (build.emit("test_export.other", first),)
        with pytest.raises(UnsupportedOpError) as caught:
            to_onnx(program)
    finally:
        del ops._ops["test_export.other"]
    assert "'test_export.alone' has no exporter: 2x" in str(caught.value)
    assert "'test_export.other' has no exporter: 1x" in str(caught.value)
