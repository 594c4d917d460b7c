"""Every converter against torch, all in one capture at fixed sizes and one at dynamic sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import CaptureError
from tersor.frontends.torch_export import capture
from tersor.ir import run

Function = Callable[..., torch.Tensor]
W = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
K = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(2))


# Functions of x [batch, length, 8] (float), i [batch, length] (int64, 0 <= i < 8), b [batch, length] (bool).
def assigned(x):
    """Writes in place to parts of a copy."""
    y = x.clone()
    y[:, 0] = 1
    y[:, 1:3] = x[:, :2]
    y[..., -1] = x[..., 0]
    return y.add_(1).masked_fill_(y > 1.5, 0.0)


ELEMENTWISE: dict[str, Function] = {
    "arithmetic": lambda x, i, b: (x + 2) * 3 - x / 4 + 1 / (x * x + 1) - (5 - x),
    "alpha": lambda x, i, b: (
        torch.add(x, x, alpha=2) + torch.sub(x, x * 2, alpha=3) + torch.rsub(x, x, alpha=2)
    ),
    "powers": lambda x, i, b: (
        2.5**x + x**2 + x.square() + (x.abs() + 1) ** 0.5 + (x.abs() + 1).rsqrt() + x.abs().sqrt()
    ),
    "functions": lambda x, i, b: (
        x.exp() + (x.abs() + 1).log() + x.sin() + x.cos() + x.tanh() + x.erf() + x.sigmoid()
    ),
    "near_one": lambda x, i, b: x.expm1() + x.abs().log1p(),
    "rounding": lambda x, i, b: x.floor() + x.ceil() * 10 + torch.sign(x),
    "activations": lambda x, i, b: (
        F.relu(x) + F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.mish(x)
    ),
    "by_decomposition": lambda x, i, b: (
        F.hardswish(x) + F.leaky_relu(x) + F.elu(x) + F.softplus(x) + F.hardtanh(x)
    ),
    "clamp": lambda x, i, b: x.clamp(-0.5) + x.clamp(max=0.5) + x.clamp(-0.2, 0.3) + torch.maximum(x, -x),
    "integer_division": lambda x, i, b: (
        (i - 4) // 3 + (i - 4) % 3 * 10 + torch.div(i - 4, 3, rounding_mode="trunc") * 100
    ),
    "true_division_of_integers": lambda x, i, b: i / 3,
    "float_division_rounded": lambda x, i, b: torch.div(x, 0.3, rounding_mode="floor") + x % 0.7,
    "comparisons": lambda x, i, b: (x > 0) & (x < 1) | (x >= 2) | ~(x <= -1) & (x != 0) | (i == 3)[..., None],
    "booleans": lambda x, i, b: torch.logical_or(torch.logical_and(b, i > 2), torch.logical_not(b)),
    "where": lambda x, i, b: torch.where(b[..., None], x, -1.0) + torch.where(x > 0, 2.0, x),
    "masked_fill": lambda x, i, b: x.masked_fill(b[..., None], -5.0),
    "casts": lambda x, i, b: (
        x.to(torch.int64).float() + b.float()[..., None] + i.to(torch.int32).type_as(x)[..., None]
    ),
    "promotion": lambda x, i, b: i * 2.5 + b * 2,
}
SHAPES: dict[str, Function] = {
    "reshape": lambda x, i, b: x.reshape(x.shape[0], -1),
    "views": lambda x, i, b: x.unflatten(2, (2, 4)).flatten(1, 2).unsqueeze(1).squeeze(1),
    "permutes": lambda x, i, b: x.transpose(0, 1).permute(2, 0, 1).movedim(0, 2).mT,
    "slices": lambda x, i, b: x[:, :-1][..., 1:7:2] + x[:, 1:, :3] + x.narrow(2, 2, 3)[:, 1:],
    "select": lambda x, i, b: x[:, 0] + x[:, -1] + x.select(2, -3)[:, :1],
    "split": lambda x, i, b: torch.cat([p * (n + 1) for n, p in enumerate(x.split(3, 2))], 2),
    "split_sizes": lambda x, i, b: x.split([1, 5, 2], -1)[1] * 2,
    "chunk": lambda x, i, b: x.chunk(2, -1)[0] - x.chunk(2, -1)[1],
    "unbind": lambda x, i, b: x.unbind(2)[3] + x.unbind(0)[0][:, 0],
    "stack": lambda x, i, b: torch.stack((x, x * 2, x.exp()), 1),
    "cat": lambda x, i, b: torch.cat((x, x[:, :2]), 1),
    "expand": lambda x, i, b: x[:, :, None].expand(-1, -1, 3, -1) + x.new_zeros(3, 1).expand(3, 8),
    "repeat": lambda x, i, b: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x, i, b: x.repeat_interleave(3, dim=1),
    "flip": lambda x, i, b: x.flip(1, -1),
    "assignments": lambda x, i, b: assigned(x),
    "roll": lambda x, i, b: x.roll(2, 1) + x.roll((1, -3), (1, 2)),
    "pad": lambda x, i, b: F.pad(x, (1, 2, 3, 0), value=0.5),
    "padded_masks": lambda x, i, b: F.pad(b, (1, 1), value=True),
    "triangles": lambda x, i, b: (
        x.triu(1) + x.tril(-1) * 2 + torch.ones(x.shape[1], x.shape[1]).triu().sum(0)[:, None]
    ),
}
INDEXING: dict[str, Function] = {
    "embedding": lambda x, i, b: F.embedding(i, W.T.contiguous()),
    "gather": lambda x, i, b: x.gather(2, i[..., None]),
    "index_select": lambda x, i, b: x.index_select(2, torch.tensor([3, 1, 1])),
    "one_index": lambda x, i, b: x[0, 0][i],
    "negative_indices": lambda x, i, b: x[:, torch.tensor([-1, 0])] + x[:, :1],
    "pairs": lambda x, i, b: x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]],
    "pairs_apart": lambda x, i, b: x[torch.arange(2), :, torch.tensor([1, 5])],
    "last_token": lambda x, i, b: x[torch.arange(x.shape[0]), b.sum(1) - 1],
    "argmax": lambda x, i, b: x.argmax(-1) + x.argmax(),
    "aranges": lambda x, i, b: torch.arange(2, x.shape[1] + 2) + torch.arange(0, 2 * x.shape[1], 2),
    "new": lambda x, i, b: (
        torch.zeros_like(x) + x.new_ones(1) + torch.full((8,), 2.5) + x.new_full((1,), 3.0)
    ),
}
REDUCTIONS: dict[str, Function] = {
    "mean_and_sum": lambda x, i, b: x.mean(-1) + x.sum(-1) + x.mean() + x.sum((1, 2), keepdim=True)[:, 0],
    "integer_sums": lambda x, i, b: b.sum(1) + i.sum(),
    "extremes": lambda x, i, b: x.amax(-1) - x.amin(-1) + x.max(-1).values + x.max() + x.min(),
    "max_indices": lambda x, i, b: x.max(1)[1],
    "any_and_all": lambda x, i, b: b.any(1) & ~b.all(1),
    "var": lambda x, i, b: x.var(-1) + x.var(-1, unbiased=False) + x.std(-1),
    "softmax": lambda x, i, b: x.softmax(-1) + x.log_softmax(1),
    "cumsum": lambda x, i, b: x.cumsum(1) + b.cumsum(1)[..., None],
    "pooling": lambda x, i, b: F.adaptive_avg_pool1d(x.mT, 1),
}
PRODUCTS: dict[str, Function] = {
    "linear": lambda x, i, b: F.linear(x, W) + F.linear(x, W, W[:, 0]),
    "linear_of_a_vector": lambda x, i, b: F.linear(x[0, 0], W),
    "matmul": lambda x, i, b: x @ W.T + torch.matmul(x, W[0])[..., None],
    "matmul_of_values": lambda x, i, b: x @ x.mT,
    "bmm": lambda x, i, b: torch.bmm(x, x.mT),
    "addmm": lambda x, i, b: torch.addmm(W[:, 0], x[:, 0], W.T, beta=2, alpha=0.5),
    "baddbmm": lambda x, i, b: torch.baddbmm(x[:, :1, :1], x, x.mT, alpha=0.5),
    "einsum": lambda x, i, b: torch.einsum("btc,nc->btn", x, W),
    "conv1d": lambda x, i, b: F.conv1d(x.mT, K, padding=1),
    "conv2d": lambda x, i, b: F.conv2d(x[:, None], K[:, :1, :, None], stride=(1, 2), padding=(4, 0)),
    "group_norm": lambda x, i, b: F.group_norm(x.mT, 2),
    "layer_norms": lambda x, i, b: F.layer_norm(x, (8,), W[0], W[1]) + F.layer_norm(x, (8,), eps=0.1),
    "rms_norm": lambda x, i, b: F.rms_norm(x, (8,), W[0], eps=1e-3) + F.rms_norm(x, (8,)),
    "batch_norm": lambda x, i, b: F.batch_norm(x.mT, W[0], W[1].abs(), W[2], W[3]),
    "attention": lambda x, i, b: F.scaled_dot_product_attention(x, x * 2, x, is_causal=True),
    "attention_of_heads": lambda x, i, b: F.scaled_dot_product_attention(
        *(x.unflatten(-1, (4, 2)).transpose(1, 2),) * 3, attn_mask=b[:, None, None], scale=0.3
    ),
    "grouped_attention": lambda x, i, b: F.scaled_dot_product_attention(
        x.unflatten(-1, (4, 2)).transpose(1, 2),
        *(x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2),) * 2,
        enable_gqa=True,
    ),
    "cross_attention": lambda x, i, b: F.scaled_dot_product_attention(x[:, :2], x, x, is_causal=True),
    "added_mask": lambda x, i, b: F.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.mT) * 0.1),
}
ALL = {**ELEMENTWISE, **SHAPES, **INDEXING, **REDUCTIONS, **PRODUCTS}


class Everything(nn.Module):
    def forward(self, x, i, b):
        return {name: function(x, i, b) for name, function in ALL.items()}


def inputs(batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1:, length // 2 + 1 :] = False
    return {
        "x": torch.randn(batch, length, 8, generator=generator),
        "i": torch.randint(0, 8, (batch, length), generator=generator),
        "b": mask,
    }


@pytest.fixture(scope="module")
def static():
    """Results of the program that was captured at fixed sizes, by length and name."""
    program = capture(Everything(), inputs())
    return {6: run(program.main, inputs())}


@pytest.fixture(scope="module")
def dynamic():
    """Results of the program with a dynamic length."""
    length = {1: ("length", 3, 40)}
    program = capture(Everything(), inputs(), {"x": length, "i": length, "b": length})
    return {n: run(program.main, inputs(length=n)) for n in (3, 6, 29)}


def compare(results, name):
    for length, outputs in results.items():
        expected = ALL[name](**inputs(length=length))
        assert outputs[name].dtype == expected.dtype
        torch.testing.assert_close(outputs[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_at_fixed_sizes(static, name):
    compare(static, name)


@pytest.mark.parametrize("name", ALL)
def test_at_dynamic_sizes(dynamic, name):
    compare(dynamic, name)


@pytest.mark.parametrize("position", [1, -2])
def test_a_position_that_small_inputs_lack_is_refused(position):
    class Model(nn.Module):
        def forward(self, x):
            return x[:, position]

    x = torch.randn(2, 5, 3)
    assert torch.equal(capture(Model(), (x,), {"x": {1: ("length", 2, 8)}})(x=x)["output"], x[:, position])
    with pytest.raises(CaptureError, match=r"allows length 1(.|\n)*narrow the range of length"):
        capture(Model(), (x,), {"x": {1: ("length", 1, 8)}})


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda x: x.to(torch.int64) & 3, "bit arithmetic"),
        (lambda x: F.dropout(x, 0.5, training=True), "at random"),
    ],
)
def test_what_the_dialect_lacks_is_refused_with_its_place(function, part):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(CaptureError) as caught:
        capture(Model(), (torch.randn(2, 6, 8),))
    assert part in str(caught.value)
