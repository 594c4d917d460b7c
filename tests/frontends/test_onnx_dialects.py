"""The same layers as different exporters and opsets write them: one canonical program."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tersor import frontends  # noqa: E402

WIDTH, HEADS, HIDDEN, LONGEST = 32, 4, 48, 20
SIZE = WIDTH // HEADS
DIMS = {0: ("batch", 1, 4), 1: ("length", 1, LONGEST)}
DYNAMIC = {"x": DIMS, "mask": DIMS}


class Encoder(nn.Module):
    """What every encoder below means."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x, mask):
        y = self.first(x)
        q, k, v = (
            p(y).unflatten(2, (HEADS, SIZE)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Decoder(nn.Module):
    """RMS norms, rotary embeddings, two heads of keys for four of queries, a causal mask, a gated layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.query, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.register_buffer("angles", torch.outer(torch.arange(LONGEST), 10.0 ** -torch.arange(SIZE // 2)))

    def forward(self, x):
        y = self.first(x)
        angles = torch.cat((self.angles, self.angles), -1)[: x.shape[1]]

        def turned(z):
            low, high = z.chunk(2, -1)
            return z * angles.cos() + torch.cat((-high, low), -1) * angles.sin()

        q = turned(self.query(y).unflatten(2, (HEADS, SIZE)).transpose(1, 2))
        k = turned(self.key(y).unflatten(2, (HEADS // 2, SIZE)).transpose(1, 2))
        v = self.value(y).unflatten(2, (HEADS // 2, SIZE)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@dataclass
class Writer:
    """Writes nodes one after the other, in the way of one opset."""

    opset: int
    nodes: list = field(default_factory=list)
    tensors: list = field(default_factory=list)

    def __call__(self, op: str, *inputs, outputs: int = 1, **attributes):
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value) -> str:
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        value = value.astype(np.float32) if value.dtype == np.float64 else value
        self.tensors.append(numpy_helper.from_array(value.copy(order="C"), f"c{len(self.tensors)}"))
        return self.tensors[-1].name

    def axes(self, op: str, since: int, x: str, *axes: int, **attributes) -> str:
        """An operator whose axes are an attribute before an opset and an operand from then on."""
        if self.opset < since:
            return self(op, x, axes=list(axes), **attributes)
        return self(op, x, np.array(axes), **attributes)

    def mean(self, x: str) -> str:
        return self.axes("ReduceMean", 18, x, -1, keepdims=1)

    def linear(self, x: str, layer: nn.Linear) -> str:
        y = self("MatMul", x, layer.weight.T)
        return y if layer.bias is None else self("Add", y, layer.bias)

    def dropout(self, x: str) -> str:
        return self("Dropout", x, ratio=0.1) if self.opset < 12 else self("Dropout", x, np.float32(0.1))

    def split_heads(self, x: str, heads: int = HEADS, dims=(0, 2, 1, 3)) -> str:
        return self("Transpose", self("Reshape", x, np.array([0, 0, heads, SIZE])), perm=list(dims))

    def merge_heads(self, x: str) -> str:
        x = self("Transpose", x, perm=[0, 2, 1, 3])
        sizes = [self("Shape", x), self("Shape", x)]  # as TorchScript: each size by itself
        sizes = [self("Gather", s, np.array(i), axis=0) for i, s in enumerate(sizes)]
        sizes = [self.axes("Unsqueeze", 13, s, 0) for s in sizes]
        return self("Reshape", x, self("Concat", *sizes, np.array([WIDTH]), axis=0))

    def model(self, result: str, inputs: dict[str, int]) -> onnx.ModelProto:
        nodes = [*self.nodes, helper.make_node("Identity", [result], ["y"])]
        shapes = {"x": ["batch", "length", WIDTH], "mask": ["batch", "length"]}
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["x"])
        values = [helper.make_tensor_value_info(n, t, shapes[n]) for n, t in inputs.items()]
        graph = helper.make_graph(nodes, "dialect", values, [output], self.tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(made)
        return made


# -- layer norms


def norm_by_pow(g: Writer, x: str, norm: nn.LayerNorm) -> str:
    centred = g("Sub", x, g.mean(x))
    deviation = g("Sqrt", g("Add", g.mean(g("Pow", centred, np.float32(2))), np.float32(1e-6)))
    return g("Add", g("Mul", g("Div", centred, deviation), norm.weight), norm.bias)


def norm_by_mul(g: Writer, x: str, norm: nn.LayerNorm) -> str:
    centred = g("Sub", x, g.mean(x))
    inverse = g("Reciprocal", g("Sqrt", g("Add", np.float32(1e-6), g.mean(g("Mul", centred, centred)))))
    return g("Add", norm.bias, g("Mul", norm.weight, g("Mul", centred, inverse)))


def norm_of_tensorflow(g: Writer, x: str, norm: nn.LayerNorm) -> str:
    mean = g.mean(x)
    difference = g("Sub", x, mean)
    variance = g.mean(g("Mul", difference, difference))
    scale = g("Mul", g("Reciprocal", g("Sqrt", g("Add", variance, np.float32(1e-6)))), norm.weight)
    return g("Add", g("Mul", x, scale), g("Sub", norm.bias, g("Mul", mean, scale)))


def norm_whole(g: Writer, x: str, norm: nn.LayerNorm) -> str:
    return g("LayerNormalization", x, norm.weight, norm.bias, axis=-1, epsilon=1e-6)


# -- GELUs


def gelu_half_last(g: Writer, x: str) -> str:
    tail = g("Add", g("Erf", g("Div", x, np.float32(2**0.5))), np.float32(1))
    return g("Mul", g("Mul", x, tail), np.float32(0.5))


def gelu_half_first(g: Writer, x: str) -> str:
    tail = g("Add", np.float32(1), g("Erf", g("Mul", x, np.float32(0.5**0.5))))
    return g("Mul", g("Mul", np.float32(0.5), x), tail)


def gelu_half_of_tail(g: Writer, x: str) -> str:
    tail = g("Add", g("Erf", g("Div", x, np.float32(2**0.5))), np.float32(1))
    return g("Mul", x, g("Mul", tail, np.float32(0.5)))


def gelu_whole(g: Writer, x: str) -> str:
    return g("Gelu", x)


# -- masks over the keys, as numbers to add


def mask_one_minus(g: Writer, mask: str) -> str:
    mask = g("Cast", g.axes("Unsqueeze", 13, mask, 1, 2), to=TensorProto.FLOAT)
    return g("Mul", g("Sub", np.float32(1), mask), np.float32(-10000))


def mask_scaled(g: Writer, mask: str) -> str:
    """Paddle's scale operator: a product and a sum with numbers."""
    mask = g.axes("Unsqueeze", 13, g("Cast", mask, to=TensorProto.FLOAT), 1, 2)
    return g("Add", g("Mul", mask, np.float32(1e4)), np.float32(-1e4))


def mask_of_padding(g: Writer, mask: str) -> str:
    padding = g("Cast", g("Equal", mask, np.array(0)), to=TensorProto.FLOAT)
    return g("Mul", g.axes("Unsqueeze", 13, padding, 1, 2), np.float32(-1e9))


def mask_where(g: Writer, mask: str) -> str:
    seen = g("Cast", g.axes("Unsqueeze", 13, mask, 1, 2), to=TensorProto.BOOL)
    return g("Where", seen, np.float32(0), np.finfo(np.float32).min)


# -- attention


def attention_by_matmul(g: Writer, y: str, mask: str, m: Encoder, *, scale: str = "after", fused: bool = False,
                        flat: bool = False) -> str:  # fmt: skip
    layers = m.query, m.key, m.value
    if fused:
        joined = g("MatMul", y, torch.cat([p.weight for p in layers]).T)
        joined = g("Add", joined, torch.cat([p.bias for p in layers]))
        sizes = [WIDTH] * 3
        if g.opset < 13:
            q, k, v = g("Split", joined, outputs=3, axis=2, split=sizes)
        else:
            q, k, v = g("Split", joined, np.array(sizes), outputs=3, axis=-1)
    elif flat:  # tokens of all texts one after the other, then Gemm
        rows = g("Reshape", y, np.array([-1, WIDTH]))
        rows = [g("Gemm", rows, p.weight, p.bias, transB=1) for p in layers]
        lead = g("Slice", g("Shape", y), np.array([0]), np.array([2]))
        shape = g("Concat", lead, np.array([WIDTH]), axis=0)
        q, k, v = (g("Reshape", r, shape) for r in rows)
    else:
        q, k, v = (g.linear(y, p) for p in layers)
    if scale == "before":
        q = g("Mul", q, np.float32(SIZE**-0.5))
    q, k, v = g.split_heads(q), g.split_heads(k, dims=(0, 2, 3, 1)), g.split_heads(v)
    scores = g("MatMul", q, k)
    if scale == "after":
        scores = g("Mul", scores, np.float32(SIZE**-0.5))
    elif scale == "divided":
        scores = g("Div", scores, np.float32(SIZE**0.5))
    scores = g("Add", scores, mask)
    chances = g.dropout(g("Softmax", scores, axis=3 if g.opset < 13 else -1))
    return g.merge_heads(g("MatMul", chances, v))


def attention_whole(g: Writer, y: str, mask: str, m: Encoder) -> str:
    q, k, v = (g.linear(y, p) for p in (m.query, m.key, m.value))
    return g("Attention", q, k, v, mask, q_num_heads=HEADS, kv_num_heads=HEADS)


def encoder(opset, norm, gelu, mask, attention=attention_by_matmul, **options) -> onnx.ModelProto:
    module, g = Encoder(), Writer(opset)
    added = mask(g, "mask")
    y = attention(g, norm(g, "x", module.first), added, module, **options)
    x = g("Add", "x", g.linear(y, module.out))
    y = g.linear(gelu(g, g.linear(norm(g, x, module.second), module.up)), module.down)
    return g.model(g("Add", x, y), {"x": TensorProto.FLOAT, "mask": TensorProto.INT64})


ENCODERS = {
    "TorchScript 11": partial(encoder, 11, norm_by_pow, gelu_half_last, mask_one_minus, scale="divided"),
    "TorchScript 13": partial(
        encoder, 13, norm_by_pow, gelu_half_last, mask_one_minus, scale="divided", fused=True
    ),
    "TorchScript 17": partial(encoder, 17, norm_whole, gelu_half_last, mask_where),
    "tf2onnx 11": partial(encoder, 11, norm_of_tensorflow, gelu_half_first, mask_one_minus, fused=True),
    "tf2onnx 13": partial(encoder, 13, norm_of_tensorflow, gelu_half_first, mask_of_padding, flat=True),
    "tf2onnx 18": partial(encoder, 18, norm_of_tensorflow, gelu_half_first, mask_one_minus, scale="before"),
    "Paddle 11": partial(encoder, 11, norm_by_pow, gelu_half_of_tail, mask_scaled, scale="before"),
    "Paddle 13": partial(encoder, 13, norm_by_mul, gelu_half_of_tail, mask_scaled, scale="before", flat=True),
    "opset 18": partial(encoder, 18, norm_by_mul, gelu_half_last, mask_where, fused=True),
    "opset 20": partial(encoder, 20, norm_whole, gelu_whole, mask_where),
    "opset 21": partial(encoder, 21, norm_whole, gelu_whole, mask_of_padding, flat=True),
    "opset 23": partial(encoder, 23, norm_whole, gelu_whole, mask_where, attention_whole),
}


def facts(program) -> tuple[Counter[str], list[dict]]:
    """The operations without what shapes them, and the attributes of the attentions."""
    names = Counter(n.target.name for n in program.main.calls())
    kept = {
        n: c for n, c in names.items() if n not in ("reshape", "cast", "ne", "eq", "logical_not", "slice")
    }
    attentions = []
    for node in program.main.calls("attention"):
        mask = node.args[3].meta["value"] if len(node.args) > 3 and node.args[3] is not None else None
        attributes = {k: round(v, 6) if isinstance(v, float) else v for k, v in node.kwargs.items()}
        attentions.append({**attributes, "causal": attributes.get("causal", False), "mask": str(mask)})
    return Counter(kept), attentions


def check(made: onnx.ModelProto, module: nn.Module, dynamic: dict) -> None:
    inputs = {"x": torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(0))}
    if "mask" in dynamic:
        inputs["mask"] = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    from_torch = frontends.capture(module.eval(), inputs, dynamic)
    program = frontends.capture(made, dynamic=dynamic)
    assert facts(program) == facts(from_torch)
    for batch, length in ((3, 9), (1, 1)):
        part = {n: v[:batch, :length] for n, v in inputs.items()}
        (actual,) = program(**part).values()
        with torch.no_grad():
            expected = module(*part.values())
        assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("dialect", ENCODERS)
def test_encoders(dialect):
    check(ENCODERS[dialect](), Encoder(), DYNAMIC)


# -- decoders


def rms_apart(g: Writer, x: str, norm: nn.RMSNorm) -> str:
    inverse = g("Reciprocal", g("Sqrt", g("Add", g.mean(g("Pow", x, np.float32(2))), np.float32(1e-6))))
    return g("Mul", g("Mul", x, inverse), norm.weight)


def rms_whole(g: Writer, x: str, norm: nn.RMSNorm) -> str:
    return g("RMSNormalization", x, norm.weight, axis=-1, epsilon=1e-6)


def length_of(g: Writer, x: str) -> str:
    return g("Slice", g("Shape", x), np.array([1]), np.array([2]))


def attention_apart(g: Writer, y: str, m: Decoder) -> str:
    """Rotations by halves, keys repeated by Expand, and a triangle cut out of a stored one."""
    end = length_of(g, y)
    angles = torch.cat((m.angles, m.angles), -1)
    cos, sin = (g("Slice", table, np.array([0]), end) for table in (angles.cos(), angles.sin()))

    def turned(x: str) -> str:
        low = g("Slice", x, np.array([0]), np.array([SIZE // 2]), np.array([3]))
        high = g("Slice", x, np.array([SIZE // 2]), np.array([2**62]), np.array([-1]))
        half = g("Concat", g("Neg", high), low, axis=-1)
        return g("Add", g("Mul", x, cos), g("Mul", half, sin))

    def repeated(x: str) -> str:
        shape = g("Concat", g("Slice", g("Shape", x), np.array([0]), np.array([1])), np.array([2, 2]), end,
                  np.array([SIZE]), axis=0)  # fmt: skip
        return g("Reshape", g("Expand", g.axes("Unsqueeze", 13, x, 2), shape), np.array([0, HEADS, -1, SIZE]))

    q = turned(g.split_heads(g.linear(y, m.query)))
    k = repeated(turned(g.split_heads(g.linear(y, m.key), HEADS // 2)))
    v = repeated(g.split_heads(g.linear(y, m.value), HEADS // 2))
    scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), np.float32(SIZE**-0.5))
    triangle = torch.ones(1, 1, LONGEST, LONGEST, dtype=torch.bool).tril()
    ends = g("Concat", end, end, axis=0)
    seen = g("Slice", triangle, np.array([0, 0]), ends, np.array([2, 3]))
    scores = g("Where", seen, scores, np.float32(-1e4))
    return g.merge_heads(g("MatMul", g("Softmax", scores, axis=3), v))


def attention_whole_causal(g: Writer, y: str, m: Decoder) -> str:
    q, k, v = (g.linear(y, p) for p in (m.query, m.key, m.value))
    rows = g("Unsqueeze", g("Range", np.array(0), g("Squeeze", length_of(g, y)), np.array(1)), np.array([0]))
    batch = g("Slice", g("Shape", y), np.array([0]), np.array([1]))
    rows = g("Expand", rows, g("Concat", batch, length_of(g, y), axis=0))
    q, k = (
        g("RotaryEmbedding", x, m.angles.cos(), m.angles.sin(), rows, num_heads=heads)
        for x, heads in ((q, HEADS), (k, HEADS // 2))
    )
    return g("Attention", q, k, v, q_num_heads=HEADS, kv_num_heads=HEADS // 2, is_causal=1)


def decoder(opset, norm, attention) -> onnx.ModelProto:
    module, g = Decoder(), Writer(opset)
    x = g("Add", "x", g.linear(attention(g, norm(g, "x", module.first), module), module.out))
    y = norm(g, x, module.second)
    gate = g.linear(y, module.gate)
    gated = g("Mul", g("Mul", gate, g("Sigmoid", gate)), g.linear(y, module.up))
    return g.model(g("Add", x, g.linear(gated, module.down)), {"x": TensorProto.FLOAT})


DECODERS = {
    "apart 11": partial(decoder, 11, rms_apart, attention_apart),
    "apart 13": partial(decoder, 13, rms_apart, attention_apart),
    "apart 18": partial(decoder, 18, rms_apart, attention_apart),
    "whole 23": partial(decoder, 23, rms_whole, attention_whole_causal),
}


@pytest.mark.parametrize("dialect", DECODERS)
def test_decoders(dialect):
    check(DECODERS[dialect](), Decoder(), {"x": DIMS})
