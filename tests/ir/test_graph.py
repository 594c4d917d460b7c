"""Questions about the graph: the view for networkx, and channels that belong together."""

from __future__ import annotations

import networkx as nx
import pytest
import small_models
import torch

from tersor.ir import Program, run, verify
from tersor.ir.graph import channel_groups, dataflow
from tersor.ir.samples import sample_inputs


def test_dataflow_is_the_graph():
    function = small_models.bert(1).main
    graph = dataflow(function)
    assert set(graph) == set(function.graph.nodes)
    assert nx.is_directed_acyclic_graph(graph)
    attention = function.calls("attention")[0]
    assert set(graph.predecessors(attention)) == set(attention.all_input_nodes)
    assert set(graph.successors(attention)) == set(attention.users)
    (ids, padding) = function.graph.find_nodes(op="placeholder")
    assert nx.has_path(graph, padding, attention) and not nx.has_path(graph, attention, padding)
    tail = {
        n.target.name for n in nx.descendants(graph, function.calls("slice")[0]) if n.op == "call_function"
    }
    assert tail == {"reshape", "linear", "tanh"}


def permute(program: Program, group, order: list[int], members=None) -> None:
    """Puts the units of a group into another order, in the given members only (default: all)."""
    for member in group.members if members is None else members:
        tensor = program.parameters[member.parameter].tensor.clone()
        taken = [tensor[(slice(None),) * member.axis + (member.of(unit),)].clone() for unit in order]
        for unit, part in enumerate(taken):
            tensor[(slice(None),) * member.axis + (member.of(unit),)] = part
        program.parameters[member.parameter] = tensor


@pytest.mark.parametrize("name", small_models.ALL)
def test_units_may_change_places_in_all_members_together(name):
    program = small_models.ALL[name]()
    inputs = sample_inputs(program.main)
    expected = run(program.main, inputs, dtype=torch.float64)
    groups = channel_groups(program)
    assert groups and not any(group.obstacle for group in groups)
    for group in groups:
        permute(program, group, [*range(1, group.count), 0])
    actual = run(program.main, inputs, dtype=torch.float64)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", small_models.ALL)
def test_no_member_is_too_many(name):
    inputs = sample_inputs(small_models.ALL[name]().main)
    expected = run(small_models.ALL[name]().main, inputs, dtype=torch.float64)
    one_of_each_kind = {g.unit: g for g in channel_groups(small_models.ALL[name]())}
    for group in one_of_each_kind.values():
        for left_out in group.members:
            if group.unit != "neuron" and left_out is group.members[3]:
                continue  # the keys' bias changes all scores of a query alike, so softmax does not see it
            program = small_models.ALL[name]()
            permute(
                program, group, [*range(1, group.count), 0], [m for m in group.members if m is not left_out]
            )
            actual = run(program.main, inputs, dtype=torch.float64)
            assert any((actual[k] - expected[k]).abs().max() > 1e-6 for k in expected), left_out


def test_members_of_each_kind_of_layer():
    def groups(program):
        return {g.name: g for g in channel_groups(program)}

    attention = groups(small_models.llama(kv_heads=2))["block.1.attention"]
    assert (attention.unit, attention.count) == ("head group", 2)
    assert [(m.parameter, m.axis, m.start, m.size) for m in attention.members] == [
        ("1.q.weight", 0, 0, 8), ("1.q.bias", 0, 0, 8), ("1.k.weight", 0, 0, 4), ("1.k.bias", 0, 0, 4),
        ("1.v.weight", 0, 0, 4), ("1.v.bias", 0, 0, 4), ("1.o.weight", 1, 0, 8),
    ]  # fmt: skip
    assert attention.members[-1].of(1) == slice(8, 16)
    fused = groups(small_models.gpt2())["block.0.attention"]
    assert fused.unit == "head"
    assert [m.start for m in fused.members if m.parameter == "h.0.c_attn.weight"] == [0, 16, 32]
    gated = groups(small_models.gemma())["block.0.ffn"]
    assert {(m.parameter, m.start) for m in gated.members} == {
        ("0.gate_up.weight", 0), ("0.gate_up.weight", 24), ("0.gate_up.bias", 0), ("0.gate_up.bias", 24),
        ("0.down.weight", 0),
    }  # fmt: skip
    assert list(groups(small_models.encoder_decoder(1))) == [
        "block.0.attention", "block.0.ffn", "block.1.attention", "block.1.cross_attention", "block.1.ffn",
    ]  # fmt: skip


def test_trace():
    group = channel_groups(small_models.bert(1))[1]
    assert str(group) == (
        "block.0.ffn: 24 neurons\n"
        "  layer.0.up.weight    axis 0, 1 per neuron from 0\n"
        "  layer.0.up.bias      axis 0, 1 per neuron from 0\n"
        "  layer.0.down.weight  axis 1, 1 per neuron from 0\n"
        "  through %gelu"
    )


def test_a_scale_of_the_hidden_channels_is_a_member():
    program = small_models.bert(1)
    (gelu,) = program.main.calls("gelu")
    build = program.main.builder(before=gelu.next)
    program.main.replace(gelu, build.mul(gelu, build.parameter("scale", torch.randn(small_models.HIDDEN))))
    group = channel_groups(program)[1]
    assert group.obstacle is None
    assert ("scale", 0, 0, 1) in [(m.parameter, m.axis, m.start, m.size) for m in group.members]


def _normalised(program):
    (gelu,) = program.main.calls("gelu")
    program.main.replace(gelu, program.main.builder(before=gelu.next).layer_norm(gelu))


def _seen_outside(program):
    program.main.set_outputs({"y": program.main.results[0], "hidden": program.main.calls("gelu")[0]})


def _shared_weight(program):
    down = next(n for n in program.main.calls("linear") if n.meta.get("site") == "layer.0.down")
    up = next(n for n in program.main.calls("linear") if n.meta.get("site") == "layer.0.up")
    transposed = program.main.builder(before=down).permute(up.args[1], dims=(1, 0))
    down.args = (down.args[0], transposed, down.args[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_normalised, "%layer_norm_3 mixes units"),
        (_seen_outside, "%gelu is also read by %output"),
        (_shared_weight, "%permute is computed, not a parameter"),
    ],
)
def test_obstacles(change, said):
    program = small_models.bert(1)
    change(program)
    verify(program)
    group = channel_groups(program)[1]
    assert said in group.obstacle and f"cannot be removed: {group.obstacle}" in str(group)


def test_layers_that_share_weights_are_an_obstacle():
    """ALBERT (Lan et al. 2020) uses one layer's weights in all layers."""
    program = small_models.bert(2)
    for node in program.main.graph.find_nodes(op="get_attr"):
        node.target = node.target.replace("layer.1.", "layer.0.")
    assert program.drop_unused_parameters()
    groups = channel_groups(program)
    assert len(groups) == 4 and all("is also read as 'layer.0." in group.obstacle for group in groups)


def test_attention_without_projections_has_no_members():
    m = small_models.Maker()
    x = m.function.add_input("x", small_models.Value("float32", (small_models.BATCH, 5, small_models.WIDTH)))
    program = m.done(y=m.attention(x, x, x))
    (group,) = channel_groups(program)
    assert not group.members and "does not come from one linear" in group.obstacle
