"""Block-wise execution: where functions are cut, what is carried, and that nothing changes."""

from __future__ import annotations

import pytest
import small_models
import torch

from tersor.errors import InputError
from tersor.ir import Program, Value, blocks, run
from tersor.ir.block import finish, start
from tersor.ir.samples import sample_inputs

EXPECTED = {
    "bert": ["embedding", "block.0", "block.1", "block.2", "head"],
    "gpt2": ["embedding", "block.0", "block.1", "block.2", "head"],
    "llama": ["embedding", "block.0", "block.1", "block.2", "head"],
    "vit": ["embedding", "block.0", "block.1", "block.2", "head"],
    "encoder_decoder": [
        "embedding",
        "block.0",
        "block.1",
        "block.2",
        "other",
        "block.3",
        "block.4",
        "block.5",
        "head",
    ],
    "gemma": ["block.0", "block.1", "block.2", "head"],
}


def stepwise(function, inputs, **options):
    state = start(function, inputs, **options)
    for block in blocks(function):
        state = block.run(state)
    return finish(function, state)


@pytest.mark.parametrize("name", small_models.ALL)
def test_parts(name):
    function = small_models.ALL[name](3).main
    assert [block.name for block in blocks(function)] == EXPECTED[name]
    operations = [node for block in blocks(function) for node in block.nodes if node.op == "call_function"]
    assert sorted(map(str, operations)) == sorted(map(str, function.calls()))


@pytest.mark.parametrize("name", small_models.ALL)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_composed_result_is_the_whole_one_bit_for_bit(name, dtype):
    function = small_models.ALL[name](3).main
    for sizes in ({"batch": 1, "length": 1}, {"batch": 3, "length": 7}):
        inputs = sample_inputs(function, {k: v for k, v in sizes.items() if k in function.dims})
        whole = run(function, inputs, dtype=dtype)
        parts = stepwise(function, inputs, dtype=dtype)
        assert whole.keys() == parts.keys()
        for key in whole:
            assert torch.equal(whole[key], parts[key])


@pytest.mark.parametrize("name", small_models.ALL)
def test_between_blocks_stands_the_stream_and_what_all_share(name):
    function = small_models.ALL[name](3).main
    shared = {
        "attention_mask",
        "mul",
        "cos",
        "sin",
        "ids",
        "layer_norm_6",
    }  # masks, rotary tables, inputs, encoder
    for block in blocks(function)[:-1]:
        assert block.stream in block.nodes and block.stream.meta["value"].rank == 3
        others = {n.name for n in block.carried if n is not block.stream}
        if name == "encoder_decoder" and block.name == "other":
            others.discard("layer_norm_6")
        assert others <= shared, block.name


def test_a_state_holds_no_more_than_is_carried():
    function = small_models.bert(3).main
    inputs = sample_inputs(function)
    state = start(function, inputs)
    for block in blocks(function):
        before = dict(state.values)
        after = block.run(state)
        assert after.values.keys() == block.carried
        assert state.values == before  # the block can run again
        assert set(block.inputs) <= before.keys()
        state = after


def test_a_block_runs_again_with_new_weights():
    program = small_models.bert(2)
    function, inputs = program.main, sample_inputs(program.main)
    state = start(function, inputs)
    for block in blocks(function):
        if block.name == "block.1":
            first = block.run(state).values[block.stream]
            program.parameters["layer.1.up.weight"] = torch.zeros(small_models.HIDDEN, small_models.WIDTH)
            assert not torch.equal(block.run(state).values[block.stream], first)
        state = block.run(state)
    for key, value in run(function, inputs).items():
        assert torch.equal(finish(function, state)[key], value)


def test_observers_see_the_operations_of_the_block():
    function = small_models.gpt2(2).main
    state, seen = start(function, sample_inputs(function)), []
    for block in blocks(function):
        count = len(seen)
        state = block.run(state, observe=lambda node, value: seen.append(node))
        assert seen[count:] == [n for n in block.nodes if n.op == "call_function"]
    assert len(seen) == len(function.calls())


def test_hidden_states_as_results_are_carried_to_the_end():
    program = small_models.gpt2(3)
    function = program.main
    states = {f"hidden.{i}": b.stream for i, b in enumerate(blocks(function)[:-1])}
    function.set_outputs({**states, "logits": function.results[0]})
    assert [block.name for block in blocks(function)] == EXPECTED["gpt2"]
    inputs = sample_inputs(function)
    parts, whole = stepwise(function, inputs), run(function, inputs)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_a_skip_around_one_block_is_part_of_it():
    function = small_models.gpt2(3).main
    first, second = (block.stream for block in blocks(function)[1:3])
    joined = function.builder(before=second.next).add(second, first)
    function.replace(second, joined)
    parts = blocks(function)
    assert [block.name for block in parts] == EXPECTED["gpt2"]
    assert parts[2].inputs == (first,) and parts[2].stream is joined
    same_as_whole(function)


def test_a_skip_around_two_blocks_keeps_them_together():
    function = small_models.gpt2(3).main
    parts = blocks(function)
    first, second, third = (block.stream for block in parts[:3])
    function.replace(third, function.builder(before=third.next).add(third, first))
    assert [block.name for block in blocks(function)] == ["embedding", "block.0-1", "block.2", "head"]
    same_as_whole(function)


def same_as_whole(function):
    inputs = sample_inputs(function)
    whole, parts = run(function, inputs), stepwise(function, inputs)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_without_attention_there_is_one_block():
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (2, 3)))
    function.set_outputs({"y": function.builder().exp(x), "x": x})
    (block,) = blocks(function)
    assert block.stream is None
    inputs = sample_inputs(function)
    assert torch.equal(stepwise(function, inputs)["y"], inputs["x"].exp())


def test_inputs_are_checked():
    function = small_models.bert(1).main
    with pytest.raises(InputError, match="attention_mask"):
        start(function, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
