"""Random programs: what holds for every program, whatever it computes."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.ir import (
    Dim,
    Program,
    Range,
    Value,
    cost,
    diff,
    load_program,
    print_program,
    run,
    save_program,
    verify,
)
from tersor.ir.dims import evaluate_shape
from tersor.ir.samples import sample_inputs

B, L = Dim.symbol("batch"), Dim.symbol("length")
UNARY = ("neg", "abs", "tanh", "relu", "sigmoid", "silu", "gelu")
BINARY = ("add", "sub", "mul", "maximum", "minimum")


@st.composite
def programs(draw) -> Program:
    """A chain of random operations over earlier values, all of shape [batch, length, width] for some width."""
    program = Program()
    function = program.add_function("main", {"batch": Range(1, 3), "length": Range(1, 5)})
    values = [function.add_input(name, Value("float32", (B, L, 4))) for name in ("x", "y")]
    build = function.builder()
    for i in range(draw(st.integers(1, 12))):
        x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        width = x.meta["value"].shape[-1]
        kind = draw(
            st.sampled_from(("unary", "binary", "number", "linear", "slice", "concat", "sum", "reshape"))
        )
        if kind == "unary":
            node = build.emit(draw(st.sampled_from(UNARY)), x)
        elif kind == "binary" and x.meta["value"] == y.meta["value"]:
            node = build.emit(draw(st.sampled_from(BINARY)), x, y)
        elif kind == "linear":
            weight = build.parameter(f"w{i}", torch.full((draw(st.integers(1, 4)), width), i / 10))
            node = build.linear(x, weight, site=f"site.{i}")
        elif kind == "slice":
            node = build.slice(x, dim=2, start=draw(st.integers(0, width - 1)))
        elif kind == "concat":
            node = build.concat((x, y, x), dim=-1)
        elif kind == "sum":
            node = build.sum(x, dims=(-1,), keepdim=True)
        elif kind == "reshape":
            node = build.reshape(build.reshape(x, shape=(B * L, width)), shape=(B, L, width))
        else:
            node = build.mul(x, draw(st.sampled_from((2, 0.5, -1.0))))
        values.append(node)
    results = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    function.set_outputs({f"out.{i}": node for i, node in enumerate(results)})
    return program


def reordered(program: Program, seed: int) -> Program:
    """The same functions with nodes in another order that the dataflow allows."""
    rng, old = random.Random(seed), program.main
    new = Program(program.parameters.copy())
    function = new.add_function("main", old.dims)
    copies, waiting = {}, [n for n in old.nodes if n.op != "output"]
    while waiting:
        inputs = [n for n in waiting if n.op == "placeholder"][:1]  # their order is the signature's
        ready = [n for n in waiting if n.op != "placeholder" and all(o in copies for o in n.all_input_nodes)]
        node = rng.choice(inputs + ready)
        copies[node] = function.graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
        waiting.remove(node)
    results = zip(old.outputs, old.results, strict=True)
    function.set_outputs({name: copies[node] for name, node in results})
    return new


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    programs(),
    st.integers(0, 9),
    st.fixed_dictionaries({"batch": st.integers(1, 3), "length": st.integers(1, 5)}),
)
def test_every_program(tmp_path, program, seed, sizes):
    verify(program)
    inputs, seen = sample_inputs(program.main, sizes), {}
    expected = run(program.main, inputs, observe=lambda node, value: seen.update({node: Value.of(value)}))
    for node, value in seen.items():
        said = node.meta["value"]
        assert value == Value(said.dtype, evaluate_shape(said.shape, sizes))

    other = reordered(program, seed)
    verify(other)
    assert other.digest() == program.digest() and diff(program, other) == ""

    save_program(program, tmp_path / "program")
    for again in (program.copy(), load_program(tmp_path / "program")):
        verify(again)
        assert again.digest() == program.digest() and print_program(again) == print_program(program)
        for name, value in run(again.main, inputs).items():
            assert torch.equal(value, expected[name])

    report = cost(program, sizes).functions["main"]
    held = {
        node: node.meta["value"].bytes.evaluate(sizes)
        for node in program.main.nodes
        if node.op == "placeholder"
    }
    assert sum(held.values()) <= report.peak_bytes <= sum(held.values()) + sum(v.bytes for v in seen.values())

    count = len(program.main.calls())
    program.main.erase_dead(*program.main.calls())
    verify(program)
    assert len(program.main.calls()) <= count
    for name, value in run(program.main, inputs).items():
        assert torch.equal(value, expected[name])
