"""Small Transformers as programs, with everything that the folds look at to choose."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Builder, Dim, Program, Range, Value, verify

BATCH, LENGTH = Dim.symbol("batch"), Dim.symbol("length")


def program(emit, *, width: int = 16, mask: str | None = None) -> Program:
    """A program of one input ``x`` [batch, length, width], whose results ``emit(build, x, mask)`` makes by name.

    ``mask``: None, "padding" (keys only) or "queries" (one row per query), boolean.
    """
    made = Program()
    function = made.add_function("main", {"batch": Range(1, 4), "length": Range(1, 32)})
    x = function.add_input("x", Value("float32", (BATCH, LENGTH, width)))
    given = None
    if mask is not None:
        shape = (BATCH, 1, LENGTH if mask == "queries" else 1, LENGTH)
        given = function.add_input("mask", Value("bool", shape))
    function.set_outputs(emit(function.builder(), x, given))
    verify(made)
    return made


class Weights:
    """Random parameters from a fixed seed; the same calls give the same numbers."""

    def __init__(self, build: Builder, seed: int = 0):
        self.build, self._generator = build, torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator) / shape[-1] ** 0.5

    def __call__(self, name: str, *shape: int) -> fx.Node:
        return self.build.parameter(name, self.tensor(*shape))

    def linear(self, x: fx.Node, site: str, outputs: int, inputs: int, *, bias: bool = True) -> fx.Node:
        weight = self(f"{site}.weight", outputs, inputs)
        return self.build.linear(x, weight, self(f"{site}.bias", outputs) if bias else None, site=site)


@dataclass
class Transformer:
    """A pre-norm (or post-norm) Transformer without embeddings.

    ``dead_heads``, ``dead_rows`` and ``dead_columns`` hold for each layer the heads whose columns of the output
    projection are zero, the neurons whose rows of the first feed-forward layer are, and those whose columns of the
    second are.
    """

    layers: int = 2
    width: int = 16
    heads: int = 4
    kv_heads: int = 4
    neurons: int = 24
    post_norm: bool = False
    rms: bool = False
    gated: bool = False
    bias: bool = True
    rotary: bool = False
    head_norm: bool = False
    causal: bool = False
    mask: str | None = "padding"
    dead_heads: tuple[tuple[int, ...], ...] = ()
    dead_rows: tuple[tuple[int, ...], ...] = ()
    dead_columns: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def build(self) -> Program:
        made = program(self._emit, width=self.width, mask=self.mask)
        for layer in range(self.layers):
            size = self.width // self.heads
            for head in _of(self.dead_heads, layer):
                self._clear(made, f"block.{layer}.attention.output.weight", 1, head * size, size)
            first = ("gate", "up") if self.gated else ("up",)
            for neuron in _of(self.dead_rows, layer):
                for role in first:
                    self._clear(made, f"block.{layer}.ffn.{role}.weight", 0, neuron, 1)
            for neuron in _of(self.dead_columns, layer):
                self._clear(made, f"block.{layer}.ffn.down.weight", 1, neuron, 1)
        return made

    @staticmethod
    def _clear(made: Program, name: str, dim: int, start: int, size: int) -> None:
        tensor = made.parameters[name].tensor.clone()
        tensor.narrow(dim, start, size).zero_()
        made.parameters[name] = tensor

    def _emit(self, build: Builder, x: fx.Node, mask: fx.Node | None) -> dict[str, fx.Node]:
        make = Weights(build, self.seed)
        for layer in range(self.layers):
            for part, emit in (("attention", self._attention), ("ffn", self._ffn)):
                site = f"block.{layer}.{part}"
                if self.post_norm:
                    x = self._norm(make, build.add(x, emit(make, x, mask, site)), f"{site}.norm")
                else:
                    x = build.add(x, emit(make, self._norm(make, x, f"{site}.norm"), mask, site))
        return {"hidden": x}

    def _norm(self, make: Weights, x: fx.Node, site: str) -> fx.Node:
        gamma = make(f"{site}.weight", self.width)
        if self.rms:
            return make.build.rms_norm(x, gamma, site=site)
        return make.build.layer_norm(x, gamma, make(f"{site}.bias", self.width), site=site)

    def _attention(self, make: Weights, x: fx.Node, mask: fx.Node | None, site: str) -> fx.Node:
        build, size = make.build, self.width // self.heads
        parts = []
        for role, count in (("query", self.heads), ("key", self.kv_heads), ("value", self.kv_heads)):
            part = make.linear(x, f"{site}.{role}", count * size, self.width, bias=self.bias)
            if role != "value":
                part = self._turned(make, part, f"{site}.{role}", count, size)
            parts.append(part)
        attended = build.attention(
            *parts,
            mask,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=size**-0.5,
            causal=self.causal,
            site=site,
        )
        return make.linear(attended, f"{site}.output", self.width, self.width, bias=self.bias)

    def _turned(self, make: Weights, x: fx.Node, site: str, heads: int, size: int) -> fx.Node:
        build = make.build
        if self.head_norm:
            split = build.reshape(x, shape=(BATCH, LENGTH, heads, size))
            x = build.reshape(
                build.rms_norm(split, make(f"{site}_norm.weight", size), site=f"{site}_norm"),
                shape=(BATCH, LENGTH, heads * size),
            )
        if self.rotary:
            steps = build.cast(build.arange(end=LENGTH), dtype="float32")
            angles = build.mul(
                build.reshape(steps, shape=(1, LENGTH, 1)), make(f"{site}.frequencies", 1, 1, size)
            )
            x = build.rotary_embedding(
                x, build.cos(angles), build.sin(angles), heads=heads, site=f"{site}_rotary"
            )
        return x

    def _ffn(self, make: Weights, x: fx.Node, mask: fx.Node | None, site: str) -> fx.Node:
        build = make.build
        if self.gated:
            gate = build.silu(make.linear(x, f"{site}.gate", self.neurons, self.width, bias=self.bias))
            hidden = build.mul(gate, make.linear(x, f"{site}.up", self.neurons, self.width, bias=self.bias))
        else:
            hidden = build.gelu(make.linear(x, f"{site}.up", self.neurons, self.width, bias=self.bias))
        return make.linear(hidden, f"{site}.down", self.width, self.neurons, bias=self.bias)


def random_transformer(rng: random.Random) -> Transformer:
    """A small one of any style, with some heads and neurons planted dead."""
    heads, groups = rng.choice([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (6, 2)])
    layers, neurons = rng.randint(1, 2), rng.randint(1, 9)
    planted = {
        name: tuple(tuple(rng.sample(range(count), rng.randint(0, count))) for _ in range(layers))
        for name, count in (("dead_heads", heads), ("dead_rows", neurons), ("dead_columns", neurons))
    }
    flags = ("post_norm", "rms", "gated", "bias", "rotary", "head_norm", "causal")
    style = {name: rng.random() < 0.5 for name in flags}
    mask = rng.choice([None, "padding", "queries"])
    width = heads * rng.choice([2, 4])
    seed = rng.randint(0, 9)
    return Transformer(layers, width, heads, groups, neurons, mask=mask, seed=seed, **style, **planted)


def _of(planted: tuple[tuple[int, ...], ...], layer: int) -> tuple[int, ...]:
    return planted[layer] if layer < len(planted) else ()


def shapes(made: Program, pattern: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters whose name contains ``pattern``."""
    return {name: tuple(p.tensor.shape) for name, p in made.parameters.items() if pattern in name}
