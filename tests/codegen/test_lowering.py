"""Every operation of the dialect, compiled and held against its torch reference at several sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tersor.codegen.compiler import build, prepare
from tersor.codegen.lowering import legalize, lower
from tersor.codegen.runtime import load
from tersor.errors import CompileError
from tersor.ir import Dim, Program, Range, Value, ops, register_op
from tersor.ir.value import DTYPES
from tersor.targets import resolve

B, T = Dim.symbol("batch"), Dim.symbol("length")
X = Value("float32", (B, T, 24))
WIDTH = 64
WIDE = Value("float32", (B, T, WIDTH))
LONG = Value("int64", (B, T))
IMAGE = Value("float32", (B, 6, 8, 12))


def program(*inputs: Value, body: Callable) -> Program:
    made = Program()
    names = {name for value in inputs for d in value.shape if isinstance(d, Dim) for name in d.symbols}
    ranges = {"batch": Range(1, 3), "length": Range(1, 20)}
    function = made.add_function("main", {name: r for name, r in ranges.items() if name in names})
    nodes = [function.add_input(f"x{i}", value) for i, value in enumerate(inputs)]
    results = body(function.builder(), *nodes)
    results = results if isinstance(results, tuple) else (results,)
    function.set_outputs({f"y{i}": node for i, node in enumerate(results)})
    return made


def errors(made: Program, folder) -> list[float]:
    """Worst relative error at each of the sizes that the compiler probes (it raises beyond 1e-4)."""
    build(prepare(made, resolve("native")), folder / "model.tersor", threads=1)
    manifest = load(folder / "model.tersor", threads=1).manifest
    assert manifest.verified
    return [max(probe["errors"].values()) for probe in manifest.errors["main"]]


def weight(b, *shape):
    return b.parameter("w", torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.3)


def coded(b, x, zero: float):
    """uint8 codes of x, their scale and their zero point."""
    scale, point = b.parameter("s", torch.tensor(0.03)), b.parameter("z", torch.tensor(zero))
    return b.quantize(x, scale, point, dtype="uint8"), scale, point


def codes_of(b, dtype: str = "int8"):
    """A stored table of codes, the smallest and the largest among them."""
    low = -128 if dtype == "int8" else 0
    return b.parameter("c", (torch.arange(50 * 24) % 256 + low).reshape(50, 24).to(DTYPES[dtype]))


def coded_rows(b, ids, form: str, zero: float | None = None):
    """Rows of a table of codes, decoded behind the look-up with a scale per row, per group of 8, or one for all."""
    rows = b.embedding(ids, codes_of(b, "int8" if zero is None else "uint8"))
    if form == "one":
        return b.dequantize(rows, b.parameter("s", torch.tensor(0.02)), zero)
    width = 1 if form == "row" else 3
    scales = b.parameter("s", torch.linspace(0.01, 0.02, 50 * width).reshape(50, width))
    read = b.index_select(scales, ids, dim=0)
    return b.dequantize(rows, read, zero, **({} if form == "row" else {"group": 8}))


def tied_codes(b, ids):
    """Rows of a table of codes, and products of what they stand for with that table."""
    rows = coded_rows(b, ids, "row")
    codes = b.quantize(rows, b.parameter("x", torch.tensor(0.03)), 128.0, dtype="uint8")
    return b.cast(b.integer_linear(codes, b.read("c")), dtype="float32"), rows


def narrow_rows(b, ids, dtype: str):
    table = b.function.parameter(weight(b, 50, 24)).to(DTYPES[dtype])
    return b.cast(b.embedding(ids, b.parameter("n", table)), dtype="float32")


def narrow(b, x, stored: bool = False, to: str = "bfloat16"):
    """Values of 16 bits as f32: of a value, or of a parameter that is stored so."""
    if stored:
        tensor = b.function.parameter(x).to(DTYPES[to])
        return b.cast(b.parameter("n", tensor), dtype="float32")
    return b.cast(b.cast(x, dtype=to), dtype="float32")


def tokens(b, x, keep: bool = False):
    """Codes of x with a scale per token, and the scales."""
    scale = b.dynamic_scale(x)
    return (b.quantize(x, scale, 128, dtype="uint8"), scale, *([x] if keep else []))


def grouped(b, x, group: int):
    """A gated pair of products of codes that have a scale per token and group."""
    scale = b.dynamic_scale(x, group=group)
    codes = b.quantize(x, scale, 128, dtype="uint8", group=group)
    generator = torch.Generator().manual_seed(0)

    def product(name: str):
        stored = b.parameter(name, torch.randint(-127, 128, (40, WIDTH), generator=generator).to(torch.int8))
        scales = b.parameter(f"{name}.scale", torch.rand(40, generator=generator) / 99)
        return b.mul(b.grouped_integer_linear(codes, stored, scale), scales)

    return b.mul(b.silu(product("g")), product("u"))


def tied_groups(b, ids):
    """Rows of a table of codes, and their products, in groups, with that table."""
    table = b.parameter("c", (torch.arange(50 * WIDTH) % 256 - 128).reshape(50, WIDTH).to(torch.int8))
    scales = b.index_select(b.parameter("s", torch.linspace(0.01, 0.02, 50).reshape(50, 1)), ids, dim=0)
    rows = b.dequantize(b.embedding(ids, table), scales)
    scale = b.dynamic_scale(rows, group=32)
    codes = b.quantize(rows, scale, 128, dtype="uint8", group=32)
    return b.grouped_integer_linear(codes, b.read("c"), scale), rows


CASES = {
    "linear": ((X,), lambda b, x: b.linear(x, weight(b, 40, 24), weight(b, 40))),
    "linear without bias": ((X,), lambda b, x: b.linear(x, weight(b, 33, 24))),
    "feed forward": (
        (X,),
        lambda b, x: b.add(
            x, b.linear(b.gelu(b.linear(x, weight(b, 40, 24), weight(b, 40))), weight(b, 24, 40))
        ),
    ),
    "gated feed forward": (
        (X,),
        lambda b, x: b.linear(
            b.mul(b.silu(b.linear(x, weight(b, 40, 24))), b.linear(x, weight(b, 40, 24))), weight(b, 24, 40)
        ),
    ),
    "layer norm": ((X,), lambda b, x: b.layer_norm(x, weight(b, 24), weight(b, 24), eps=1e-5)),
    "plain layer norm": ((X,), lambda b, x: b.layer_norm(x, None, None)),
    "rms norm": ((X,), lambda b, x: b.rms_norm(x, weight(b, 24))),
    "embedding": ((LONG,), lambda b, ids: b.embedding(ids, weight(b, 50, 24))),
    "tied embedding": (
        (LONG,),
        lambda b, ids: b.linear(b.embedding(ids, (t := weight(b, 50, 24))), b.read(t.target)),
    ),
    "embedding in a table of dynamic rows": (
        (LONG, X),
        lambda b, ids, x: b.embedding(ids, b.sum(x, dims=(0,))),
    ),
    "embedding in a table of dynamic width": (
        (X,),
        lambda b, x: b.embedding(
            b.parameter("i", torch.tensor([3, 0])), b.permute(b.reshape(x, shape=(B * T, 24)), dims=(1, 0))
        ),
    ),
    "embedding in a table of integers": (
        (LONG,),
        lambda b, ids: b.embedding(ids, b.parameter("t", torch.arange(12).reshape(4, 3))),
    ),
    "rows of bf16": ((LONG,), lambda b, ids: narrow_rows(b, ids, "bfloat16")),
    "rows of fp16": ((LONG,), lambda b, ids: narrow_rows(b, ids, "float16")),
    "rows of codes with a scale each": ((LONG,), lambda b, ids: coded_rows(b, ids, "row")),
    "rows of codes that a projection multiplies, too": ((LONG,), lambda b, ids: tied_codes(b, ids)),
    "rows of codes with one scale and a zero point": (
        (LONG,),
        lambda b, ids: coded_rows(b, ids, "one", 117.0),
    ),
    "rows of codes with scales by group": ((LONG,), lambda b, ids: coded_rows(b, ids, "group")),
    "rows of codes read twice": (
        (LONG,),
        lambda b, ids: ((y := coded_rows(b, ids, "row")), b.cast(y.args[0], dtype="float32")),
    ),
    "rows of a table that is decoded whole": (
        (LONG,),
        lambda b, ids: b.embedding(
            ids,
            b.dequantize(codes_of(b), b.parameter("s", torch.linspace(0.01, 0.02, 50)), axis=0),
        ),
    ),
    "softmax": ((X,), lambda b, x: b.softmax(x, dim=-1)),
    "softmax over another dimension": ((X,), lambda b, x: b.softmax(x, dim=1)),
    "log softmax": ((X,), lambda b, x: b.log_softmax(x, dim=2)),
    "sum": ((X,), lambda b, x: b.sum(x, dims=(1,))),
    "sum of integers": ((LONG,), lambda b, x: b.sum(b.gt(x, 0), dims=(1,), keepdim=True)),
    "mean": ((X,), lambda b, x: b.mean(x, dims=(-1,), keepdim=True)),
    "amax": ((X,), lambda b, x: b.amax(x, dims=(0, 2))),
    "amin": ((X,), lambda b, x: b.amin(x, dims=(2,))),
    "cumsum": ((X,), lambda b, x: b.cumsum(x, dim=1)),
    "cumsum of booleans": ((LONG,), lambda b, x: b.cumsum(b.gt(x, 0), dim=1)),
    "argmax": ((X,), lambda b, x: (b.argmax(x, dim=-1), b.argmax(x, dim=1, keepdim=True))),
    "reshape": ((X,), lambda b, x: b.neg(b.reshape(x, shape=(B * T, 24)))),
    "permute": ((X,), lambda b, x: b.permute(x, dims=(2, 0, 1))),
    "permute of unit dimensions": (
        (X,),
        lambda b, x: b.add(b.permute(b.mean(x, dims=(1,), keepdim=True), dims=(1, 0, 2)), 1.0),
    ),
    "expand": ((X,), lambda b, x: b.expand(b.mean(x, dims=(2,), keepdim=True), shape=(B, T, 24))),
    "slice": ((X,), lambda b, x: b.slice(x, dim=2, start=3, end=20, step=2)),
    "slice to the length": ((X,), lambda b, x: b.add(x, b.slice(weight(b, 20, 24), dim=0, end=T))),
    "last position": ((X,), lambda b, x: b.slice(x, dim=1, start=T - 1)),
    "last of doubled positions": (
        (X,),
        lambda b, x: b.slice(b.concat((x, x), dim=1), dim=1, start=2 * T - 1),
    ),
    "last rows of a flattened batch": (
        (X,),
        lambda b, x: b.slice(b.reshape(x, shape=(B * T, 24)), dim=0, start=B * T - T, end=B * T - T + 1),
    ),
    "concat": ((X, X), lambda b, x, y: b.concat((x, y, x), dim=1)),
    "pad": ((X,), lambda b, x: b.pad(x, pads=(1, 2, 0, 3), value=0.5)),
    "index select": ((X,), lambda b, x: b.index_select(x, b.parameter("i", torch.tensor([[3, 0]])), dim=2)),
    "product of compound rows and a stack": (
        (X,),
        lambda b, x: b.matmul(b.reshape(x, shape=(B * T, 24)), weight(b, 2, 24, 3)),
    ),
    "gather": ((X,), lambda b, x: b.gather(x, b.full(shape=(B, T, 2), value=5, dtype="int64"), dim=2)),
    "arange": ((X,), lambda b, x: b.mul(x, b.reshape(b.arange(end=T), shape=(T, 1)))),
    "conv1d": (
        (Value("float32", (B, 3, 16)),),
        lambda b, x: b.conv1d(x, weight(b, 24, 3, 3), weight(b, 24), stride=2, padding=1),
    ),
    "conv2d": (
        (Value("float32", (B, 3, 8, 12)),),
        lambda b, x: b.conv2d(x, weight(b, 24, 3, 4, 4), weight(b, 24), stride=(4, 4)),
    ),
    "convolution of every channel": (
        (IMAGE,),
        lambda b, x: b.conv2d(
            x, weight(b, 12, 1, 3, 3), weight(b, 12), padding=(1, 1), stride=(2, 1), groups=6
        ),
    ),
    "convolution in groups": (
        (IMAGE,),
        lambda b, x: b.conv2d(
            x, weight(b, 4, 3, 3, 2), weight(b, 4), padding=(2, 0), dilation=(2, 1), groups=2
        ),
    ),
    "convolution of pixels": ((IMAGE,), lambda b, x: b.conv2d(x, weight(b, 4, 6, 1, 1))),
    "convolution of every channel of a line": (
        (Value("float32", (B, 6, T)),),
        lambda b, x: b.conv1d(x, weight(b, 6, 1, 3), weight(b, 6), padding=1, groups=6),
    ),
    "max pool": ((IMAGE,), lambda b, x: b.max_pool2d(x, kernel=(3, 3), stride=(2, 2), padding=(1, 1))),
    "average pool": (
        (IMAGE,),
        lambda b, x: b.avg_pool2d(x, kernel=(3, 3), stride=(1, 1), padding=(1, 1), count_padding=False),
    ),
    "counted padding": (
        (IMAGE,),
        lambda b, x: b.avg_pool2d(x, kernel=(2, 3), stride=(2, 2), padding=(0, 1), count_padding=True),
    ),
    "resample": (
        (IMAGE,),
        lambda b, x: b.resample(x, b.parameter("p", torch.randint(0, 8, (5, 2))), weight(b, 5, 2), dim=-2),
    ),
    "argsort": (
        (X, LONG),
        lambda b, x, i: (b.argsort(x, dim=1, descending=True), b.argsort(b.mul(i, i), dim=-1)),
    ),
    **{
        f"scatter, {how}": (
            (X,),
            lambda b, x, how=how: b.scatter(x, b.argsort(x, dim=1), b.mul(x, 2.0), dim=1, reduce=how),
        )
        for how in ("none", "add", "mul", "amax", "amin")
    },
    "a size as a number": (
        (LONG,),
        lambda b, i: b.add(
            b.mul(i, b.full(shape=(), value=T, dtype="int64")), b.full(shape=(T,), value=2 * T, dtype="int64")
        ),
    ),
    "mask arithmetic": ((LONG,), lambda b, m: b.mul(b.sub(1.0, m), -10000.0)),
    "where": ((X, LONG), lambda b, x, m: b.where(b.reshape(b.eq(m, 0), shape=(B, T, 1)), 0.0, x)),
    "rotary": (
        (X, Value("float32", (1, T, 8))),
        lambda b, x, angle: b.rotary_embedding(x, b.cos(angle), b.sin(angle), heads=3),
    ),
    "attention": (
        (X, LONG),
        lambda b, x, m: b.attention(
            *(b.linear(x, weight(b, 24, 24), weight(b, 24)) for _ in range(2)),
            b.linear(x, weight(b, 24, 24)),
            b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T)),
            heads=3,
            kv_heads=3,
            scale=0.3,
        ),
    ),
    "capped attention": (
        (X, LONG),
        lambda b, x, m: b.attention(
            b.linear(x, weight(b, 24, 24)),
            b.mul(b.linear(x, weight(b, 24, 24)), 9.0),
            x,
            b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T)),
            heads=3,
            kv_heads=3,
            scale=0.3,
            softcap=2.0,
        ),
    ),
    "attention of codes": (
        (X, LONG),
        lambda b, x, m: b.integer_attention(
            *(
                b.quantize(
                    b.linear(x, weight(b, n, 24)),
                    b.full(shape=(), value=0.02, dtype="float32"),
                    128,
                    dtype="uint8",
                )
                for n in (24, 12, 12)
            ),
            b.parameter("score", torch.tensor([0.001, 0.002])),
            b.parameter("value", torch.tensor([0.02])),
            b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T)),
            heads=2,
            kv_heads=1,
        ),
    ),
    "grouped causal attention": (
        (X,),
        lambda b, x: b.attention(
            x,
            b.linear(x, weight(b, 8, 24)),
            b.linear(x, weight(b, 8, 24)),
            heads=6,
            kv_heads=2,
            scale=0.3,
            causal=True,
        ),
    ),
    "cross attention": (
        (X, Value("float32", (B, 7, 24))),
        lambda b, x, y: b.attention(x, y, y, heads=2, kv_heads=2, scale=0.3),
    ),
    "window and additive mask": (
        (X, Value("float32", (1, 1, T, T))),
        lambda b, x, m: b.attention(x, x, x, m, heads=2, kv_heads=2, scale=0.3, causal=True, window=4),
    ),
    "matmul": ((X,), lambda b, x: b.matmul(x, b.permute(x, dims=(0, 2, 1)))),
    "matmul of a matrix": ((X,), lambda b, x: b.matmul(x, weight(b, 24, 5))),
    "codes and back": ((X,), lambda b, x: b.dequantize(*coded(b, x, zero=128.0))),
    "codes of every token": (
        (X,),
        lambda b, x: b.quantize(x, b.dynamic_scale(x), b.parameter("z", torch.tensor(128.0)), dtype="uint8"),
    ),
    "a weight in codes": (
        (X,),
        lambda b, x: b.linear(
            b.dequantize(*coded(b, x, zero=3.0)),
            b.dequantize(
                b.parameter("w", torch.randint(-127, 128, (40, 24)).to(torch.int8)),
                b.parameter("ws", torch.rand(40) / 99),
                axis=0,
            ),
        ),
    ),
    "a product of codes": (
        (X,),
        lambda b, x: b.add(
            b.mul(
                b.cast(
                    b.integer_linear(
                        coded(b, x, zero=3.0)[0],
                        b.parameter("w", torch.randint(-127, 128, (40, 24)).to(torch.int8)),
                        b.parameter("k", torch.randint(-999, 999, (40,)).to(torch.int32)),
                    ),
                    dtype="float32",
                ),
                b.parameter("m", torch.rand(40) / 999),
            ),
            b.dynamic_scale(x),
        ),
    ),
    "products of groups of codes": ((WIDE,), lambda b, x: grouped(b, x, 32)),
    "products of groups of a norm's codes": ((WIDE,), lambda b, x: grouped(b, b.layer_norm(x), 16)),
    "groups that no product of codes has": ((WIDE,), lambda b, x: grouped(b, x, 8)),
    "a tied table of codes in groups": ((LONG,), tied_groups),
    "a norm, its codes and itself": ((X,), lambda b, x: (n := b.layer_norm(x), *coded(b, n, zero=7.0)[:1])),
    "a norm that only codes read": (
        (X,),
        lambda b, x: coded(b, b.rms_norm(x, b.parameter("g", torch.linspace(-1, 1, 24))), zero=99.0)[0],
    ),
    "a norm, its codes per token and itself": ((X,), lambda b, x: tokens(b, b.layer_norm(x), keep=True)),
    "a norm that only codes per token read": ((X,), lambda b, x: tokens(b, b.rms_norm(x))),
    "codes per token of a product": ((X,), lambda b, x: tokens(b, b.mul(b.silu(x), x))),
    "a product of bf16": (
        (X,),
        lambda b, x: b.gelu(
            b.linear(narrow(b, b.layer_norm(x)), narrow(b, weight(b, 40, 24), stored=True), weight(b, 40))
        ),
    ),
    "a gated product of bf16": (
        (X,),
        lambda b, x: (
            n := narrow(b, x),
            b.mul(
                b.silu(b.linear(n, narrow(b, weight(b, 40, 24), stored=True))),
                b.linear(n, narrow(b, weight(b, 40, 24), stored=True)),
            ),
        )[1],
    ),
    "a product of fp16": (
        (X,),
        lambda b, x: b.gelu(
            b.linear(
                narrow(b, b.layer_norm(x), to="float16"),
                narrow(b, weight(b, 40, 24), stored=True, to="float16"),
                weight(b, 40),
            )
        ),
    ),
    "fp16 weights alone, two layers of one input": (
        (X,),
        lambda b, x: b.mul(
            b.silu(b.linear(x, narrow(b, weight(b, 40, 24), stored=True, to="float16"))),
            b.linear(x, narrow(b, weight(b, 40, 24), stored=True, to="float16")),
        ),
    ),
    "fp16 values and what they are made of": (
        (X,),
        lambda b, x: (narrow(b, x, to="float16"), b.cast(x, dtype="float16")),
    ),
    "attention in bf16 and its codes": (
        (X,),
        lambda b, x: coded(
            b,
            b.attention(
                *(b.linear(x, weight(b, 24, 24), weight(b, 24)) for _ in range(3)),
                heads=3,
                kv_heads=3,
                scale=0.3,
                products="bfloat16",
            ),
            zero=100.0,
        )[0],
    ),
    "an input twice": ((X,), lambda b, x: (x, x)),
    "a weight": ((X,), lambda b, x: (b.add(x, 1.0), weight(b, 3, 4))),
    "a scalar weight": ((X,), lambda b, x: b.mul(x, b.parameter("s", torch.tensor(0.25)))),
}


@pytest.mark.parametrize("case", CASES)
def test_operation(case, tmp_path):
    inputs, body = CASES[case]
    # one code of many may be its neighbour where a sum in bf16 is rounded otherwise, as may one fp16 value
    allowed = 4e-3 if "bf16" in case else 5e-4 if "product of fp16" in case else 1e-5
    assert max(errors(program(*inputs, body=body), tmp_path)) <= allowed


@pytest.mark.parametrize("tied", [tied_codes, tied_groups])
def test_a_tied_table_of_codes_is_stored_once(tied):
    made = program(LONG, body=tied)
    weights = lower(legalize(made), resolve("native")).weights["main"]
    assert sorted(w.sources for w in weights if "c" in w.sources) == [("c",)]


@pytest.mark.parametrize(("op", "more"), [("add", {}), ("softmax", {"dim": -1})])
def test_nothing_is_computed_in_fp16(op, more, tmp_path):
    operands = [1.0] if op == "add" else []
    made = program(X, body=lambda b, x: b.emit(op, b.cast(x, dtype="float16"), *operands, **more))
    with pytest.raises(CompileError, match="dtype float16 is not supported: 1x"):
        build(prepare(made, resolve("native")), tmp_path / "model.tersor")


def test_everything_unsupported_is_listed_at_once(tmp_path):
    if "test.unlowered" not in ops:
        register_op("test.unlowered", lambda x: -x, infer=lambda x: x)
    made = program(
        X,
        body=lambda b, x: (b.emit("test.unlowered", x), b.cast(x, dtype="float64"), b.cast(x, dtype="int16")),
    )
    with pytest.raises(CompileError) as caught:
        build(prepare(made, resolve("native")), tmp_path / "model.tersor")
    assert all(
        word in str(caught.value) for word in ("'test.unlowered'", "float64", "int16", "register_lowering")
    )
    assert not list(tmp_path.iterdir())


def test_tuning_is_recorded_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = program(Value("float32", (16, 24)), body=CASES["linear"][1])
    build(prepare(made, resolve("native"), tune_minutes=1), tmp_path / "model.tersor")
    (record,) = load(tmp_path / "model.tersor", threads=1).manifest.tuning
    lines = (tmp_path / "cache/tersor/tuning.jsonl").read_text().splitlines()
    assert record["kernel"].startswith("gemm_24x40") and len(lines) == 1
    build(prepare(made, resolve("native"), tune_minutes=1), tmp_path / "again.tersor")
    again = load(tmp_path / "again.tersor", threads=1)
    assert again.manifest.tuning[0]["key"] == record["key"]
    assert len((tmp_path / "cache/tersor/tuning.jsonl").read_text().splitlines()) == 1
