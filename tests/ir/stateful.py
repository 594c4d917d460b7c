"""Programs with state that tests of several kinds use."""

from __future__ import annotations

import math

import torch

from tersor.ir import Dim, Function, Program, Range, Value

HEADS, KV_HEADS, SIZE, ROOM = 4, 2, 8, 12
WIDTH = HEADS * SIZE


def f32(*shape: int | Dim) -> Value:
    return Value("float32", shape)


def counter() -> Program:
    """Adds x to a state and gives the sum of all so far."""
    program = Program()
    function = program.add_function("main")
    x, total = function.add_input("x", f32(3)), function.add_state("total", f32(3))
    y = function.builder().add(total, x)
    function.set_outputs({"y": y}, {"total": y})
    return program


def decoder(layers: int = 2, functions: tuple[str, ...] = ("prefill", "decode")) -> Program:
    """A causal decoder over [1, length, WIDTH] with caches of keys and values; ``prefill`` takes up to ROOM positions,
    ``decode`` one. ``position`` is where the first one stands.
    """
    program = Program()
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, n: int) -> None:
        program.parameters.add(name, torch.randn(n, WIDTH, generator=generator) / math.sqrt(WIDTH))

    for i in range(layers):
        weight(f"{i}.query", WIDTH)
        weight(f"{i}.key", KV_HEADS * SIZE)
        weight(f"{i}.value", KV_HEADS * SIZE)
        weight(f"{i}.output", WIDTH)
    for name in functions:
        _decoder_function(program, name, layers)
    return program


def _decoder_function(program: Program, name: str, layers: int) -> Function:
    long = name != "decode"
    function = program.add_function(name, {"length": Range(1, ROOM)} if long else {})
    length = Dim.symbol("length") if long else 1
    x, position = (
        function.add_input("x", f32(1, length, WIDTH)),
        function.add_input("position", Value("int64", ())),
    )
    build = function.builder()
    rows = build.reshape(build.add(build.arange(end=length), position), shape=(1, 1, length, 1))
    mask = build.le(build.arange(end=ROOM), rows)
    updates = {}
    for i in range(layers):
        q, k, v = (build.linear(x, build.read(f"{i}.{role}")) for role in ("query", "key", "value"))
        kept = {}
        for role, new in (("key", k), ("value", v)):
            state = function.add_state(f"{i}.{role}", f32(1, ROOM, KV_HEADS * SIZE))
            kept[role] = updates[f"{i}.{role}"] = build.cache_update(state, new, position, dim=1)
        a = build.attention(
            q, kept["key"], kept["value"], mask, heads=HEADS, kv_heads=KV_HEADS, scale=1 / math.sqrt(SIZE)
        )
        x = build.add(x, build.linear(a, build.read(f"{i}.output"), site=f"{name}.{i}.output"))
    function.set_outputs({"y": x}, updates)
    return function
