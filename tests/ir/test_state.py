"""State: declared once, read and updated by functions, handed from call to call."""

from __future__ import annotations

import pytest
import torch
from stateful import ROOM, WIDTH, counter, decoder, f32

from tersor.errors import InputError, ProgramError
from tersor.ir import (
    Dim,
    Program,
    Range,
    Value,
    blocks,
    cost,
    diff,
    is_state,
    load_program,
    run,
    save_program,
    verify,
)
from tersor.ir.block import finish, start
from tersor.ir.canonicalize import canonicalize
from tersor.ir.canonicalize.cleanup import merge_duplicates, remove_dead
from tersor.ir.canonicalize.states import merge_heads_of_state
from tersor.ir.samples import sample_inputs, sample_states
from tersor.ir.state import in_place
from tersor.ir.structure import attention_layers


def decode(program: Program, x: torch.Tensor, first: int) -> torch.Tensor:
    """All positions of x: the first ones by prefill, the others one by one."""
    states = program.zero_states()
    start = {"x": x[:, :first], "position": torch.tensor(0)}
    parts = [run(program.functions["prefill"], start, states)["y"]]
    for at in range(first, x.shape[1]):
        step = {"x": x[:, at : at + 1], "position": torch.tensor(at)}
        parts.append(run(program.functions["decode"], step, states)["y"])
    return torch.cat(parts, 1)


def test_a_state_is_handed_from_call_to_call():
    program = counter()
    verify(program)
    states, x = program.zero_states(), torch.arange(3.0)
    first = states["total"]
    for calls in (1, 2, 3):
        assert torch.equal(run(program.main, {"x": x}, states)["y"], calls * x)
    assert torch.equal(states["total"], 3 * x) and not first.any()
    assert torch.equal(program(x=x)["y"], x), "without states a call is a first call"


def test_a_state_is_no_input_and_no_output():
    function = counter().main
    assert list(function.inputs) == ["x"] and function.outputs == ("y",)
    assert function.states == {"total": f32(3)} and list(function.updates) == ["total"]
    assert is_state(function.state_nodes["total"]) and not is_state(function.input_nodes[0])


def test_prefill_and_decode_share_their_states():
    program, x = decoder(), torch.randn(1, 10, WIDTH)
    verify(program)
    whole = run(program.functions["prefill"], {"x": x, "position": torch.tensor(0)})["y"]
    torch.testing.assert_close(decode(program, x, 7), whole)
    torch.testing.assert_close(decode(program, x, 1), whole)


def test_states_of_the_wrong_shape_are_refused():
    program = counter()
    with pytest.raises(InputError, match="'total' has shape"):
        run(program.main, {"x": torch.ones(3)}, {"total": torch.zeros(4)})
    with pytest.raises(InputError, match="'total' is missing"):
        run(program.main, {"x": torch.ones(3)}, {})


def test_writing_outside_a_state_is_an_error():
    function, x = decoder().functions["decode"], torch.randn(1, 1, WIDTH)
    for position in (ROOM, -1):
        with pytest.raises(Exception, match="(?i)index"):
            run(function, {"x": x, "position": torch.tensor(position)})


def test_what_only_a_state_keeps_alive_stays():
    program = counter()
    build = program.main.builder()
    program.main.set_update("total", build.mul(program.main.updates["total"], 0.5))
    build.neg(program.main.updates["total"])  # dead
    assert remove_dead(program.main) == 1
    merge_duplicates(program.main)
    assert program.main.updates["total"].target.name == "mul"
    program.main.replace(program.main.updates["total"], program.main.updates["total"].args[0])
    verify(program)
    assert program.main.updates["total"] is program.main.results[0]


def test_copies_and_saved_programs_are_the_same(tmp_path):
    program, x = decoder(), torch.randn(1, 9, WIDTH)
    copy = program.copy()
    save_program(program, tmp_path / "saved")
    loaded = load_program(tmp_path / "saved")
    for other in (copy, loaded):
        verify(other)
        assert other.digest() == program.digest() and other.states == program.states
        assert diff(program, other) == ""
        torch.testing.assert_close(decode(other, x, 4), decode(program, x, 4))
    copy.functions["decode"].add_state("more", f32(2))
    assert "more" not in program.states and copy.digest() != program.digest()


def test_the_digest_knows_states():
    program, other = counter(), counter()
    other.main.set_outputs({"y": other.main.results[0]}, {})
    assert program.digest() != other.digest() and "$total = %add" in diff(program, other)
    as_input = Program()
    function = as_input.add_function("main")
    x, total = function.add_input("x", f32(3)), function.add_input("total", f32(3))
    function.set_outputs({"y": function.builder().add(total, x)})
    assert as_input.digest() != other.digest()


def test_text_shows_states():
    text = str(counter())
    assert "main(x: float32[3]) states $total: float32[3]" in text
    assert "%add = add($total, %x)" in text and "return y = %add; $total = %add" in text


def test_specialize_leaves_states_alone():
    program = decoder()
    fixed = program.specialize({"length": 3})
    verify(fixed)
    assert fixed.states == program.states and fixed.functions["prefill"].inputs["x"] == f32(1, 3, WIDTH)


def test_a_state_has_one_value_and_a_fixed_shape():
    program = counter()
    other = program.add_function("other", {"n": Range(1, 4)})
    with pytest.raises(ProgramError, match=r"is float32\[3\], not float32\[4\]"):
        other.add_state("total", f32(4))
    with pytest.raises(ProgramError, match="no state 'unknown'"):
        other.add_state("unknown")
    with pytest.raises(ProgramError, match="not fixed"):
        other.add_state("grows", f32(Dim.symbol("n")))
    other.add_state("total")
    with pytest.raises(ProgramError, match="already"):
        other.add_state("total")


def _unknown_update(program):
    program.main.set_update("other", program.main.results[0])


def _wrong_shape(program):
    x = program.main.input_nodes[0]
    program.main.set_update("total", program.main.builder().reshape(x, shape=(1, 3)))


def _wrong_dtype(program):
    program.main.set_update("total", program.main.builder().cast(program.main.input_nodes[0], dtype="int64"))


def _undeclared(program):
    del program.states["total"]


def _other_value(program):
    program.states["total"] = f32(4)


def _twice(program):
    node = program.main.add_input("total", f32(3))
    node.meta["state"] = True


def _symbolic(program):
    program.main.dims["n"] = Range(1, 4)
    program.main.state_nodes["total"].meta["value"] = program.states["total"] = f32(Dim.symbol("n"))


def _not_a_node(program):
    program.main.output_node.args = (program.main.results, {"total": 3})


def _not_a_mapping(program):
    program.main.output_node.args = (program.main.results, program.main.results)


def _foreign_states(program):
    program.main.declared = dict(program.states)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_unknown_update, "updates the state 'other', which it does not have"),
        (_wrong_shape, r"updates the state 'total', float32\[3\], with float32\[1, 3\]"),
        (_wrong_dtype, "with int64"),
        (_undeclared, "which the program does not have"),
        (_other_value, r"the state is float32\[4\]"),
        (_twice, "2 states called 'total'"),
        (_symbolic, "not fixed"),
        (_not_a_node, "not a node"),
        (_not_a_mapping, "not a mapping"),
        (_foreign_states, "another program's states"),
    ],
)
def test_the_verifier_finds_what_is_wrong_with_states(damage, said):
    program = counter()
    damage(program)
    with pytest.raises(ProgramError, match=said):
        verify(program)


def test_an_input_and_a_state_may_share_a_name():
    program = Program()
    function = program.add_function("main")
    x, kept = function.add_input("x", f32(2)), function.add_state("x", f32(2))
    function.set_outputs({"y": function.builder().sub(x, kept)}, {"x": x})
    verify(program)
    states = program.zero_states()
    run(function, {"x": torch.ones(2)}, states)
    assert torch.equal(run(function, {"x": torch.full((2,), 3.0)}, states)["y"], torch.full((2,), 2.0))


def test_cache_update_takes_positions_or_the_first():
    from tersor.ir import ops

    state, value = torch.zeros(2, 6, 3), torch.randn(2, 3, 3)
    after = ops.cache_update(state, value, torch.tensor(2), dim=1)
    assert torch.equal(after[:, 2:5], value) and not after[:, [0, 1, 5]].any() and not state.any()
    scattered = ops.cache_update(state, value, torch.tensor([5, 0, 3]), dim=-2)
    assert torch.equal(scattered[:, [5, 0, 3]], value) and not scattered[:, [1, 2, 4]].any()


def test_in_place_is_what_leads_from_a_state_to_its_next_value():
    program = decoder(layers=1)
    function = program.functions["decode"]
    nodes = in_place(function)
    assert set(nodes.values()) == {"0.key", "0.value"}
    assert set(function.calls("cache_update")) <= nodes.keys()
    build = function.builder()
    function.set_update("0.key", build.mul(function.updates["0.key"], 2.0))
    assert set(in_place(function).values()) == {"0.value"}
    key, value = function.state_nodes["0.key"], function.state_nodes["0.value"]
    function.set_outputs({"y": function.results[0]}, {"0.key": value, "0.value": key})
    assert not in_place(function), "states that change places are not updated in place"


def test_costs_count_states_once_and_updates_in_place():
    program = decoder(layers=2)
    report = cost(program)
    size = ROOM * 2 * 8 * 4
    assert report.state_bytes == 4 * size and report.functions["decode"].state_bytes == 4 * size
    decode_cost = report.functions["decode"]
    assert decode_cost.ops["cache_update"].bytes == 4 * (2 * 2 * 8 * 4 + 8)
    assert decode_cost.peak_bytes < size, "states and their updates are no activations"
    assert "in each session" in str(report) and report.to_json()["state_bytes"] == 4 * size


def test_blocks_carry_states():
    program, x = decoder(layers=3), torch.randn(1, 5, WIDTH)
    function = program.functions["prefill"]
    parts = blocks(function)
    assert [p.name for p in parts if p.name.startswith("block")] == ["block.0", "block.1", "block.2"]
    inputs = {"x": x, "position": torch.tensor(2)}
    expected, got = sample_states(function), sample_states(function)
    state = start(function, inputs, states=got)
    for part in parts:
        state = part.run(state)
    results = finish(function, state, got)
    torch.testing.assert_close(results["y"], run(function, inputs, expected)["y"])
    torch.testing.assert_close(got, expected)


def test_a_block_updates_the_states_that_only_later_calls_read():
    """Prefill attends to its own keys; the cache is filled beside the stream."""
    program = decoder(layers=3, functions=("prefill",))
    function = program.functions["prefill"]
    for attention in function.calls("attention"):
        q, k, v = (attention.args[0], *(attention.args[i].args[1] for i in (1, 2)))
        build = function.builder(before=attention)
        function.replace(attention, build.attention(q, k, v, **attention.kwargs | {"causal": True}))
    verify(program)
    parts = {p.name: p for p in blocks(function)}
    assert {"block.0", "block.1", "block.2"} <= parts.keys()
    for i in range(3):
        names = {n.args[0].target for n in parts[f"block.{i}"].nodes if n in function.calls("cache_update")}
        assert names == {f"{i}.key", f"{i}.value"}


def test_projections_are_found_through_a_cache():
    for layer in attention_layers(decoder().functions["decode"]):
        assert None not in (layer.query, layer.key, layer.value, layer.output) and not layer.cross
        assert layer.key.args[1].target.endswith(".key")


def test_samples_stay_inside_the_states():
    program = decoder()
    for seed in range(20):
        for name, sizes in (("prefill", {"length": 9}), ("decode", {})):
            function = program.functions[name]
            inputs, states = sample_inputs(function, sizes, seed), sample_states(function, sizes, seed)
            run(function, inputs, states)
    assert len({int(sample_inputs(function, {}, seed)["position"]) for seed in range(20)}) > 3
    assert states["0.key"].std() > 0.5


def test_sampled_positions_are_consecutive():
    program = Program()
    function = program.add_function("main")
    at = function.add_input("at", Value("int64", (4,)))
    build, state = function.builder(), function.add_state("k", f32(9, 2))
    count = function.add_state("count", Value("int64", ()))
    at = build.add(at, build.mul(count, 0))
    new = build.cache_update(state, build.full(shape=(4, 2), value=1.0, dtype="float32"), at, dim=0)
    function.set_outputs({"y": new}, {"k": new, "count": build.add(count, 4)})
    for seed in range(10):
        made = sample_inputs(function, seed=seed)["at"]
        assert torch.equal(made.diff(), torch.ones(3, dtype=torch.int64)) and 0 <= made[0] <= 5


def test_canonical_form_keeps_states():
    program, x = decoder(), torch.randn(1, 8, WIDTH)
    before = decode(program, x, 5)
    canonicalize(program)
    verify(program)
    torch.testing.assert_close(decode(program, x, 5), before)


# -- programs put together, caches laid out


def test_merged_programs_share_states_and_equal_parameters():
    program, other = decoder(functions=("prefill",)), decoder(functions=("decode",))
    x = torch.randn(1, 9, WIDTH)
    expected = decode(decoder(), x, 4)
    other.parameters["0.output"] = other.parameters["0.output"].tensor * 1.0  # equal contents, other memory
    program.merge(other)
    verify(program)
    assert not other.functions and program.parameters.keys() == decoder().parameters.keys()
    torch.testing.assert_close(decode(program, x, 4), expected)


def test_merged_programs_keep_parameters_apart_that_differ():
    program, other = decoder(functions=("prefill",)), decoder(functions=("decode",))
    other.parameters["0.output"] = other.parameters["0.output"].tensor * 2.0
    program.merge(other)
    verify(program)
    assert "0.output_1" in program.parameters
    assert program.functions["decode"].graph.find_nodes(op="get_attr")


def test_programs_that_do_not_go_together():
    program, other = decoder(), counter()
    function = other.add_function("decode")
    k = function.add_state("0.key", f32(3))
    function.set_outputs({"y": k})
    before = program.digest()
    said = r"function 'decode'; state '0.key' is float32\[1, 12, 16\] here and float32\[3\]"
    with pytest.raises(ProgramError, match=said):
        program.merge(other)
    assert program.digest() == before and list(other.functions) == ["main", "decode"]


def split_cache(read: str) -> Program:
    """A cache [1, heads, room, size], as models keep it; ``read`` says how it is used."""
    program = Program()
    function = program.add_function("main")
    x, at = function.add_input("x", f32(1, 2, 16)), function.add_input("at", Value("int64", ()))
    k, b = function.add_state("k", f32(1, 2, 9, 8)), function.builder()
    new = b.permute(b.reshape(x, shape=(1, 2, 2, 8)), dims=(0, 2, 1, 3))
    seen = b.cache_update(k, new, at, dim=2)
    if read == "merged":
        y = b.reshape(b.permute(seen, dims=(0, 2, 1, 3)), shape=(1, 9, 16))
        y = b.attention(x, y, y, heads=2, kv_heads=2, scale=0.3)
    elif read == "split":
        y = b.matmul(b.matmul(new, b.permute(k, dims=(0, 1, 3, 2))), seen)
    else:
        y = b.neg(x)
    function.set_outputs({"y": y}, {"k": seen})
    verify(program)
    return program


@pytest.mark.parametrize(("read", "merged"), [("merged", True), ("never", True), ("split", False)])
def test_caches_lie_as_they_are_read(read, merged):
    program = split_cache(read)
    before = program.copy()
    canonicalize(program)
    verify(program)
    assert program.states["k"] == (f32(1, 9, 16) if merged else f32(1, 2, 9, 8))
    assert bool(program.main.calls("permute")) is not merged
    states = [before.zero_states(), program.zero_states()]
    for at in (0, 7, 3):
        inputs = {"x": torch.randn(1, 2, 16), "at": torch.tensor(at)}
        results = [run(p.main, inputs, s)["y"] for p, s in zip((before, program), states, strict=True)]
        torch.testing.assert_close(*results)
    kept = states[1]["k"]
    if merged:
        kept = kept.reshape(1, 9, 2, 8).transpose(1, 2)
    torch.testing.assert_close(kept, states[0]["k"])


@pytest.mark.parametrize("handed", ["result", "update"])
def test_a_relaid_state_is_handed_out_as_it_was(handed):
    program = split_cache("merged")
    function = program.main
    seen, other = function.updates["k"], function.add_state("other", f32(1, 2, 9, 8))
    results = {"y": function.results[0]} | ({"kept": seen} if handed == "result" else {})
    build = function.builder()
    next_other = seen if handed == "update" else build.mul(other, 2.0)
    function.set_outputs(results, {"k": seen, "other": next_other})
    before = program.copy()
    merge_heads_of_state(program, "k")
    verify(program)
    inputs = {"x": torch.randn(1, 2, 16), "at": torch.tensor(4)}
    kept = [before.zero_states(), program.zero_states()]
    for _ in range(2):
        results = [run(p.main, inputs, states) for p, states in zip((before, program), kept, strict=True)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(kept[0]["other"], kept[1]["other"])
    assert kept[1]["k"].shape == (1, 9, 16)
