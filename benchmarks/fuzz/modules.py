"""Random Transformers as torch modules, each part written in one of the ways that people write it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tersor.ir import Dim, Function, Program, run

BATCH, LENGTH = (1, 4), (1, 13)
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu erf": lambda x: 0.5 * x * (1.0 + torch.erf(x / 2**0.5)),
    "gelu new": lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3)))),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
    "squared relu": lambda x: F.relu(x).square(),
    "hardswish": F.hardswish,
}


@dataclass
class Example:
    """A module, its example inputs, and which of their axes are dynamic."""

    module: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, tuple[str, int, int]]]


class Norm(nn.Module):
    """A norm of the last axis, by torch's own module or spelt out."""

    KINDS = ("layer", "layer plain", "layer spelt", "layer var", "rms", "rms spelt", "rms root")

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind, self.eps = kind, 1e-5
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if self.kind == "layer plain":
            return F.layer_norm(x, x.shape[-1:], None, None, self.eps)
        if self.kind == "layer spelt":
            centred = x - x.mean(-1, keepdim=True)
            scale = torch.sqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
            return centred / scale * self.weight + self.bias
        if self.kind == "layer var":
            variance = x.var(-1, keepdim=True, unbiased=False)
            return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        if self.kind == "rms spelt":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Attention over heads, split, masked, scored and merged in one of many ways."""

    SPLITS = ("view", "unflatten", "chunk", "packed view")
    SCORES = ("sdpa", "softmax", "softmax scaled query", "baddbmm", "einsum")

    def __init__(self, rng: random.Random, width: int):
        super().__init__()
        self.heads = rng.choice([h for h in (1, 2, 4) if width % h == 0])
        self.size = width // self.heads
        self.groups = rng.choice([g for g in (1, self.heads) if self.heads % g == 0])
        self.split = rng.choice(self.SPLITS if self.groups == self.heads else self.SPLITS[:2])
        self.scores = rng.choice(self.SCORES)
        self.causal, self.rotary, self.bias = (
            rng.random() < 0.4,
            rng.random() < 0.3 and self.size % 2 == 0,
            rng.random() < 0.2,
        )
        self.repeat = rng.choice(("interleave", "expand"))
        bias = rng.random() < 0.7
        if self.split in ("chunk", "packed view"):
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        else:
            inner = self.groups * self.size
            self.q, self.k, self.v = (nn.Linear(width, n, bias=bias) for n in (width, inner, inner))
        self.out = nn.Linear(width, width, bias=bias)
        self.register_buffer(
            "slopes", torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)]), persistent=False
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self._heads(x)
        if self.rotary:
            q, k = self._turn(q), self._turn(k)
        if self.groups != self.heads:
            k, v = self._repeated(k), self._repeated(v)
        mixed = self._mixed(q, k, v, self._mask(mask, x, length))
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        batch, length, _ = x.shape
        if self.split == "chunk":
            parts = self.qkv(x).chunk(3, -1)
        elif self.split == "packed view":
            packed = self.qkv(x).view(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
            return list(packed.unbind(0))
        else:
            parts = [layer(x) for layer in (self.q, self.k, self.v)]
        if self.split == "unflatten":
            return [p.unflatten(-1, (-1, self.size)).transpose(1, 2) for p in parts]
        return [p.view(batch, length, -1, self.size).transpose(1, 2) for p in parts]

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[2], dtype=torch.float32)
        rates = 100.0 ** -(torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(steps, rates)
        angles = torch.cat((angles, angles), -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        count = self.heads // self.groups
        if self.repeat == "interleave":
            return x.repeat_interleave(count, 1)
        batch, groups, length, size = x.shape
        return x[:, :, None].expand(batch, groups, count, length, size).reshape(batch, -1, length, size)

    def _mask(self, mask: torch.Tensor | None, x: torch.Tensor, length: int) -> torch.Tensor | None:
        """Numbers to add to the scores."""
        total = None
        if mask is not None:
            total = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        if self.causal:
            hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
            causal = torch.zeros(length, length).masked_fill(hidden, -1e9)
            total = causal if total is None else torch.maximum(total + causal, torch.tensor(-1e30))
        if self.bias:
            steps = torch.arange(length)
            far = (steps[None, :] - steps[:, None]).abs().float() * -self.slopes[:, None, None]
            total = far[None] if total is None else total + far
        return total

    def _mixed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        scale = self.size**-0.5
        if self.scores == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.scores == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        elif self.scores == "softmax scaled query":
            scores = (q * scale) @ k.transpose(-1, -2)
        elif self.scores == "baddbmm":
            flat = [t.flatten(0, 1) for t in (q, k)]
            scores = (
                torch.bmm(flat[0], flat[1].transpose(1, 2)).view(
                    q.shape[0], self.heads, q.shape[2], k.shape[2]
                )
                / scale**-1
            )
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) / self.size**0.5
        scores = scores if mask is None else scores + mask
        weights = F.softmax(scores, dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.scores == "einsum" else weights @ v


class FeedForward(nn.Module):
    """Two linear layers, gated or not."""

    def __init__(self, rng: random.Random, width: int):
        super().__init__()
        self.gated, neurons = rng.choice(("no", "two", "chunk")), rng.choice((3, 8, 12))
        self.act = ACTIVATIONS[rng.choice(list(ACTIVATIONS))]
        self.up = nn.Linear(width, neurons * (2 if self.gated == "chunk" else 1), bias=rng.random() < 0.6)
        self.gate = nn.Linear(width, neurons, bias=False) if self.gated == "two" else None
        self.down = nn.Linear(neurons, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        if self.gated == "chunk":
            up, gate = up.chunk(2, -1)
            return self.down(self.act(gate) * up)
        return self.down(self.act(up) if self.gate is None else self.act(self.gate(x)) * up)


class Transformer(nn.Module):
    """Tokens or features in, one or two blocks, one of several heads."""

    HEADS = ("hidden", "first", "mean", "masked mean", "logits", "max")

    def __init__(self, rng: random.Random):
        super().__init__()
        width = rng.choice((4, 6, 8, 16))
        self.tokens, self.masked = rng.random() < 0.6, rng.random() < 0.6
        self.embed = nn.Embedding(11, width)
        self.places = nn.Embedding(LENGTH[1], width) if rng.random() < 0.4 else None
        norm = rng.choice(Norm.KINDS)
        self.pre, self.parallel = rng.random() < 0.6, rng.random() < 0.2
        count = rng.choice((1, 1, 2))
        self.norms = nn.ModuleList(Norm(norm, width) for _ in range(2 * count))
        self.mixers = nn.ModuleList(Attention(rng, width) for _ in range(count))
        self.feeds = nn.ModuleList(FeedForward(rng, width) for _ in range(count))
        self.head = rng.choice(
            self.HEADS if self.masked else tuple(h for h in self.HEADS if h != "masked mean")
        )
        self.tied = rng.random() < 0.5
        self.classes = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.tokens:
            x = self.embed(x)
        if self.places is not None:
            x = x + self.places(torch.arange(x.shape[1]))
        for i, (mixer, feed) in enumerate(zip(self.mixers, self.feeds, strict=True)):
            first, second = self.norms[2 * i], self.norms[2 * i + 1]
            if self.parallel:
                normed = first(x)
                x = x + mixer(normed, mask) + feed(normed)
            elif self.pre:
                x = x + mixer(first(x), mask)
                x = x + feed(second(x))
            else:
                x = first(x + mixer(x, mask))
                x = second(x + feed(x))
        return self._result(x, mask)

    def _result(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.head == "first":
            return torch.tanh(self.classes(x[:, 0]))
        if self.head == "mean":
            return self.classes(x.mean(1))
        if self.head == "max":
            return x.amax(1)
        if self.head == "masked mean":
            kept = mask.unsqueeze(-1).float()
            return (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        if self.head == "logits":
            return F.linear(x, self.embed.weight) if self.tied else self.classes(x)
        return x


def random_module(rng: random.Random) -> Example:
    """A Transformer with random weights, with dynamic batch and length, one of them, or none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randrange(1 << 30))
        module = Transformer(rng).eval()
        batch, length = 2, 5
        width = module.embed.embedding_dim
        x = torch.randint(0, 11, (batch, length)) if module.tokens else torch.randn(batch, length, width)
    inputs = {"x": x}
    if module.masked:
        inputs["mask"] = torch.ones(batch, length, dtype=torch.int64)
    axes: dict[int, tuple[str, int, int]] = {0: ("batch", *BATCH), 1: ("length", *LENGTH)}
    kept = rng.choice(((0, 1), (0, 1), (0,), (1,), ()))
    dynamic = {name: {a: axes[a] for a in kept} for name in inputs} if kept else {}
    return Example(module, inputs, dynamic)


class Replayed(nn.Module):
    """A program as a torch module: its operations are called one by one in torch."""

    def __init__(self, program: Program):
        super().__init__()
        self.function: Function = program.main
        for i, parameter in enumerate(program.parameters.values()):
            self.register_buffer(f"p{i}", parameter.tensor)

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        return run(self.function, inputs)


def axes_of(function: Function) -> dict[str, dict[int, tuple[str, int, int]]]:
    """Axes of the inputs whose size is a named dimension, as `tersor.capture` takes them."""
    found = {}
    for name, value in function.inputs.items():
        axes = {i: str(d) for i, d in enumerate(value.shape) if isinstance(d, Dim)}
        if axes:
            found[name] = {i: (d, function.dims[d].min, function.dims[d].max) for i, d in axes.items()}
    return found
