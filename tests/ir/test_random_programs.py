"""Random programs: what holds for every program, whatever it computes."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.programs import random_program
from tersor.ir import (
    Program,
    Value,
    cost,
    diff,
    load_program,
    run,
    save_program,
    verify,
)
from tersor.ir.dims import evaluate_shape
from tersor.ir.samples import sample_inputs


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
@given(st.randoms(use_true_random=False), st.integers(0, 9))
def test_every_program(tmp_path, rng, seed):
    program = random_program(rng)
    sizes = {name: rng.randint(r.min, r.max) for name, r in program.main.dims.items()}
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
        assert again.digest() == program.digest() and diff(program, again) == ""
        for name, value in run(again.main, inputs).items():
            assert torch.equal(value, expected[name])

    report = cost(program, sizes).functions["main"]
    held = {
        node: evaluate_shape((node.meta["value"].bytes,), sizes)[0]
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
