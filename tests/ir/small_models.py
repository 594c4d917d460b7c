"""Small Transformers written directly in the dialect, each with another structure; weights are random."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Builder, Dim, Function, Program, Range, Value

BATCH, LENGTH = Dim.symbol("batch"), Dim.symbol("length")
DIMS = {"batch": Range(1, 4), "length": Range(1, 12)}
WIDTH, HEADS, HIDDEN, WORDS = 16, 4, 24, 50


class Maker:
    """A function under construction with the pieces that the models share."""

    def __init__(self, dims: dict[str, Range] | None = None, seed: int = 0):
        self.program = Program()
        self.function: Function = self.program.add_function("main", DIMS if dims is None else dims)
        self.build: Builder = self.function.builder()
        self._generator = torch.Generator().manual_seed(seed)

    def weight(self, name: str, *shape: int) -> fx.Node:
        return self.build.parameter(name, torch.randn(shape, generator=self._generator) * 0.3)

    def linear(self, x: fx.Node, name: str, width: int, site: bool = True) -> fx.Node:
        weight = self.weight(f"{name}.weight", width, x.meta["value"].shape[-1])
        return self.build.linear(x, weight, self.weight(f"{name}.bias", width), site=name if site else None)

    def layer_norm(self, x: fx.Node, name: str) -> fx.Node:
        return self.build.layer_norm(
            x, self.weight(f"{name}.weight", WIDTH), self.weight(f"{name}.bias", WIDTH), site=name
        )

    def rms_norm(self, x: fx.Node, name: str) -> fx.Node:
        return self.build.rms_norm(x, self.weight(f"{name}.weight", x.meta["value"].shape[-1]), site=name)

    def attention(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None = None, causal: bool = False,
                  heads: int = HEADS, kv_heads: int = HEADS) -> fx.Node:  # fmt: skip
        scale = (q.meta["value"].shape[-1] // heads) ** -0.5
        return self.build.attention(q, k, v, mask, heads=heads, kv_heads=kv_heads, scale=scale, causal=causal)

    def embed(self, ids: fx.Node, name: str, rows: int = WORDS) -> fx.Node:
        return self.build.embedding(ids, self.weight(name, rows, WIDTH))

    def positions(self, name: str, offset: int = 0) -> fx.Node:
        return self.embed(self.build.arange(end=LENGTH), name, DIMS["length"].max)

    def done(self, **results: fx.Node) -> Program:
        self.function.set_outputs(results)
        return self.program


def bert(layers: int = 2) -> Program:
    """Post-norm encoder with an additive padding mask, pooler and classifier."""
    m = Maker()
    build = m.build
    ids = m.function.add_input("input_ids", Value("int64", (BATCH, LENGTH)))
    padding = m.function.add_input("attention_mask", Value("int64", (BATCH, LENGTH)))
    keep = build.cast(build.reshape(padding, shape=(BATCH, 1, 1, LENGTH)), dtype="float32")
    mask = build.mul(build.sub(1.0, keep), -1e9)
    x = m.layer_norm(build.add(m.embed(ids, "words"), m.positions("positions")), "embeddings.norm")
    for i in range(layers):
        at = f"layer.{i}"
        q, k, v = (m.linear(x, f"{at}.self.{role}", WIDTH) for role in ("query", "key", "value"))
        x = m.layer_norm(
            build.add(m.linear(m.attention(q, k, v, mask), f"{at}.dense", WIDTH), x), f"{at}.norm1"
        )
        up = build.gelu(m.linear(x, f"{at}.up", HIDDEN))
        x = m.layer_norm(build.add(m.linear(up, f"{at}.down", WIDTH), x), f"{at}.norm2")
    first = build.reshape(build.slice(x, dim=1, end=1), shape=(BATCH, WIDTH))
    pooled = build.tanh(m.linear(first, "pooler", WIDTH))
    return m.done(hidden=x, logits=m.linear(pooled, "classifier", 2))


def gpt2(layers: int = 2) -> Program:
    """Pre-norm decoder, one projection for queries, keys and values, head tied to the embedding."""
    m = Maker()
    build = m.build
    ids = m.function.add_input("input_ids", Value("int64", (BATCH, LENGTH)))
    x = build.add(m.embed(ids, "wte"), m.positions("wpe"))
    for i in range(layers):
        fused = m.linear(m.layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.c_attn", 3 * WIDTH)
        q, k, v = (build.slice(fused, dim=-1, start=j * WIDTH, end=(j + 1) * WIDTH) for j in range(3))
        x = build.add(m.linear(m.attention(q, k, v, causal=True), f"h.{i}.c_proj", WIDTH), x)
        up = build.gelu_tanh(m.linear(m.layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.c_fc", HIDDEN))
        x = build.add(x, m.linear(up, f"h.{i}.c_out", WIDTH))
    return m.done(logits=build.linear(m.layer_norm(x, "ln_f"), build.read("wte"), site="lm_head"))


def llama(layers: int = 2, kv_heads: int = 2) -> Program:
    """Pre-norm decoder with rotary tables computed at run time, grouped key heads, gated feed-forward; no
    sites.
    """
    m = Maker()
    build, size = m.build, WIDTH // HEADS
    ids = m.function.add_input("input_ids", Value("int64", (BATCH, LENGTH)))
    angle = build.matmul(
        build.reshape(build.cast(build.arange(end=LENGTH), dtype="float32"), shape=(1, LENGTH, 1)),
        build.parameter("frequencies", torch.tensor([[[1.0, 0.1] * 2]])),
    )
    cos, sin = build.cos(angle), build.sin(angle)
    x = m.embed(ids, "embed")
    for i in range(layers):
        y = build.rms_norm(x, m.weight(f"{i}.norm1", WIDTH))
        q, k, v = (
            m.linear(y, f"{i}.{name}", heads * size, site=False)
            for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads))
        )
        q = build.rotary_embedding(q, cos, sin, heads=HEADS)
        k = build.rotary_embedding(k, cos, sin, heads=kv_heads)
        attended = m.attention(q, k, v, causal=True, kv_heads=kv_heads)
        x = build.add(x, m.linear(attended, f"{i}.o", WIDTH, site=False))
        y = build.rms_norm(x, m.weight(f"{i}.norm2", WIDTH))
        gate = build.silu(m.linear(y, f"{i}.gate", HIDDEN, site=False))
        gated = build.mul(gate, m.linear(y, f"{i}.up", HIDDEN, site=False))
        x = build.add(x, m.linear(gated, f"{i}.down", WIDTH, site=False))
    return m.done(logits=m.linear(build.rms_norm(x, m.weight("norm", WIDTH)), "head", WORDS, site=False))


def vit(layers: int = 2) -> Program:
    """Pre-norm encoder over patches with a class token, static but for the batch."""
    m = Maker({"batch": Range(1, 4)})
    build = m.build
    pixels = m.function.add_input("pixels", Value("float32", (BATCH, 3, 8, 8)))
    patches = build.conv2d(pixels, m.weight("patch.weight", WIDTH, 3, 4, 4), m.weight("patch.bias", WIDTH),
                           stride=(4, 4), site="patch")  # fmt: skip
    tokens = build.permute(build.reshape(patches, shape=(BATCH, WIDTH, 4)), dims=(0, 2, 1))
    start = build.expand(m.weight("class", 1, 1, WIDTH), shape=(BATCH, 1, WIDTH))
    x = build.add(build.concat((start, tokens), dim=1), m.weight("positions", 1, 5, WIDTH))
    for i in range(layers):
        y = m.layer_norm(x, f"{i}.norm1")
        q, k, v = (m.linear(y, f"{i}.{role}", WIDTH) for role in "qkv")
        x = build.add(m.linear(m.attention(q, k, v), f"{i}.o", WIDTH), x)
        up = build.gelu(m.linear(m.layer_norm(x, f"{i}.norm2"), f"{i}.up", HIDDEN))
        x = build.add(m.linear(up, f"{i}.down", WIDTH), x)
    first = build.reshape(build.slice(m.layer_norm(x, "norm"), dim=1, end=1), shape=(BATCH, WIDTH))
    return m.done(logits=m.linear(first, "head", 10))


def encoder_decoder(layers: int = 2) -> Program:
    """Pre-norm encoder over features; decoder over ids whose blocks also attend to the encoder's result."""
    m = Maker()
    build = m.build
    features = m.function.add_input("features", Value("float32", (BATCH, 6, 8)))
    ids = m.function.add_input("ids", Value("int64", (BATCH, LENGTH)))

    def attend(x: fx.Node, name: str, memory: fx.Node | None = None) -> fx.Node:
        y = m.layer_norm(x, f"{name}.norm")
        q = m.linear(y, f"{name}.q", WIDTH)
        k, v = (m.linear(y if memory is None else memory, f"{name}.{role}", WIDTH) for role in "kv")
        attended = m.attention(q, k, v, causal=name.endswith("self"))
        return build.add(x, m.linear(attended, f"{name}.o", WIDTH))

    def feed(x: fx.Node, name: str) -> fx.Node:
        up = build.gelu(m.linear(m.layer_norm(x, f"{name}.norm"), f"{name}.up", HIDDEN))
        return build.add(x, m.linear(up, f"{name}.down", WIDTH))

    x = m.linear(features, "project", WIDTH)
    for i in range(layers):
        x = feed(attend(x, f"encoder.{i}"), f"encoder.{i}.ffn")
    memory = m.layer_norm(x, "encoder.norm")
    x = build.add(m.embed(ids, "words"), m.positions("positions"))
    for i in range(layers):
        x = attend(attend(x, f"decoder.{i}.self"), f"decoder.{i}.cross", memory)
        x = feed(x, f"decoder.{i}.ffn")
    return m.done(logits=m.linear(m.layer_norm(x, "decoder.norm"), "head", WORDS))


def gemma(layers: int = 2) -> Program:
    """Norms before and behind each layer, norms on queries and keys, gate and up fused, on [batch, length,
    width] input.
    """
    m = Maker()
    build, size = m.build, WIDTH // HEADS
    x = m.function.add_input("embeddings", Value("float32", (BATCH, LENGTH, WIDTH)))

    def per_head(y: fx.Node, name: str) -> fx.Node:
        heads = build.reshape(y, shape=(BATCH, LENGTH, HEADS, size))
        return build.reshape(build.rms_norm(heads, m.weight(name, size)), shape=(BATCH, LENGTH, WIDTH))

    for i in range(layers):
        y = m.rms_norm(x, f"{i}.pre1")
        q, k, v = (m.linear(y, f"{i}.{role}", WIDTH) for role in "qkv")
        attended = m.attention(per_head(q, f"{i}.qn"), per_head(k, f"{i}.kn"), v, causal=True)
        x = build.add(x, m.rms_norm(m.linear(attended, f"{i}.o", WIDTH), f"{i}.post1"))
        both = m.linear(m.rms_norm(x, f"{i}.pre2"), f"{i}.gate_up", 2 * HIDDEN)
        gate, up = (build.slice(both, dim=-1, start=j * HIDDEN, end=(j + 1) * HIDDEN) for j in range(2))
        down = m.linear(build.mul(build.gelu_tanh(gate), up), f"{i}.down", WIDTH)
        x = build.add(x, m.rms_norm(down, f"{i}.post2"))
    return m.done(hidden=m.rms_norm(x, "norm"))


ALL = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
    "encoder_decoder": encoder_decoder,
    "gemma": gemma,
}
