"""Sites: structural names found from the graph, selection by either name, survival of rewriting."""

from __future__ import annotations

import pytest
import small_models

from tersor.errors import InputError
from tersor.ir import Program, find_site, select, sites
from tersor.ir.site import structural_names


def structural(program: Program) -> dict[str, str]:
    """Structural names by the name given at capture, for nodes that have both."""
    return {s.node.meta["site"]: s.structural for s in sites(program) if "site" in s.node.meta}


def test_post_norm_encoder():
    names = structural(small_models.bert())
    assert names == {
        "embeddings.norm": "embedding.norm",
        **{
            f"layer.{i}.{site}": f"block.{i}.{name}"
            for i in range(2)
            for site, name in {
                "self.query": "attention.query",
                "self.key": "attention.key",
                "self.value": "attention.value",
                "dense": "attention.output",
                "norm1": "attention.norm",
                "up": "ffn.up",
                "down": "ffn.down",
                "norm2": "ffn.norm",
            }.items()
        },
        "pooler": "head.linear",
        "classifier": "head.linear_1",
    }
    found = {s.structural for s in sites(small_models.bert())}
    assert found >= {"embedding.table", "embedding.table_1", "block.1.attention", "block.1.ffn.activation"}


def test_pre_norm_decoder_with_one_projection():
    names = structural(small_models.gpt2())
    assert names == {
        **{
            f"h.{i}.{site}": f"block.{i}.{name}"
            for i in range(2)
            for site, name in {
                "ln_1": "attention.norm",
                "c_attn": "attention.qkv",
                "c_proj": "attention.output",
                "ln_2": "ffn.norm",
                "c_fc": "ffn.up",
                "c_out": "ffn.down",
            }.items()
        },
        "ln_f": "head.norm",
        "lm_head": "head.linear",
    }


def test_gated_decoder_with_rotary_and_no_given_names():
    found = {s.name: s.node.target.name for s in sites(small_models.llama())}
    for i in range(2):
        for name, op in {
            "attention": "attention",
            "attention.norm": "rms_norm",
            "attention.query": "linear",
            "attention.key": "linear",
            "attention.value": "linear",
            "attention.query_rotary": "rotary_embedding",
            "attention.key_rotary": "rotary_embedding",
            "attention.output": "linear",
            "ffn.norm": "rms_norm",
            "ffn.gate": "linear",
            "ffn.activation": "silu",
            "ffn.up": "linear",
            "ffn.down": "linear",
        }.items():
            assert found.pop(f"block.{i}.{name}") == op
    assert found == {
        "embedding.matmul": "matmul",
        "embedding.table": "embedding",
        "head.norm": "rms_norm",
        "head.linear": "linear",
    }
    function = small_models.llama().main
    for node, name in structural_names(function).items():
        if name.endswith((".query", ".gate", ".up")):
            parameter = node.args[1].target
            assert parameter.endswith(
                {"query": ".q.weight", "gate": ".gate.weight", "up": ".up.weight"}[name.split(".")[-1]]
            )


def test_patches_are_an_embedding():
    names = structural(small_models.vit())
    assert names["patch"] == "embedding.conv"
    assert (names["norm"], names["head"]) == ("head.norm", "head.linear")
    assert names["1.norm2"] == "block.1.ffn.norm"


def test_decoder_blocks_hold_their_cross_attention():
    names = structural(small_models.encoder_decoder())
    assert names["encoder.1.q"] == "block.1.attention.query"
    assert names["encoder.norm"] == "other.norm"
    assert names["decoder.0.self.q"] == "block.2.attention.query"
    assert names["decoder.0.cross.q"] == "block.2.cross_attention.query"
    assert names["decoder.0.cross.k"] == "block.2.cross_attention.key"
    assert names["decoder.0.cross.norm"] == "block.2.cross_attention.norm"
    assert names["decoder.1.ffn.down"] == "block.3.ffn.down"
    assert names["project"] == "embedding.linear"


def test_norms_around_layers_and_on_queries_and_keys():
    program = small_models.gemma()
    names = structural(program)
    assert names["1.pre1"] == "block.1.attention.norm" and names["1.post1"] == "block.1.attention.post_norm"
    assert names["1.pre2"] == "block.1.ffn.norm" and names["1.post2"] == "block.1.ffn.post_norm"
    assert names["1.gate_up"] == "block.1.ffn.gate_up" and names["norm"] == "head.norm"
    assert find_site(program, "block.0.attention.query_norm").node.args[1].target == "0.qn"
    assert find_site(program, "block.0.attention.key_norm").node.args[1].target == "0.kn"


def test_attention_and_feed_forward_beside_each_other():
    m = small_models.Maker()
    build = m.build
    x = m.embed(
        m.function.add_input("ids", small_models.Value("int64", (small_models.BATCH, small_models.LENGTH))),
        "e",
    )
    for i in range(2):
        y = m.layer_norm(x, f"{i}.norm")
        q, k, v = (m.linear(y, f"{i}.{role}", small_models.WIDTH) for role in "qkv")
        attended = m.linear(m.attention(q, k, v), f"{i}.o", small_models.WIDTH)
        up = build.gelu(m.linear(y, f"{i}.up", small_models.HIDDEN))
        x = build.add(x, build.add(attended, m.linear(up, f"{i}.down", small_models.WIDTH)))
    names = structural(m.done(y=x))
    assert names["1.norm"] == "block.1.attention.norm"
    assert (names["1.up"], names["1.down"]) == ("block.1.ffn.up", "block.1.ffn.down")


def test_a_head_of_two_linears_is_no_feed_forward():
    m = small_models.Maker()
    x = m.function.add_input("x", small_models.Value("float32", (small_models.BATCH, small_models.WIDTH)))
    program = m.done(y=m.linear(m.build.tanh(m.linear(x, "a", 8)), "b", 3))
    assert not any(name.startswith("block") for name in structural(program).values())


def test_roles():
    roles = {s.structural: s.role for s in sites(small_models.bert())}
    assert roles["block.0.attention"] == "attention"
    assert roles["block.1.attention.query"] == "query"
    assert roles["embedding.table_1"] == "table"
    program = small_models.bert()
    program.main.calls("tanh")[0].meta["site"] = "pooler.act"
    assert (
        find_site(program, "pooler.act").role == "tanh"
        and find_site(program, "pooler.act").structural is None
    )


# -- selection


def selected(program, **globs):
    return [s.name for s in select(program, **globs)]


def test_select_by_either_name():
    program = small_models.bert()
    both = ["layer.0.self.query", "layer.1.self.query"]
    assert selected(program, only=["layer.*.query"]) == both
    assert selected(program, only=["block.*.attention.query"]) == both
    assert selected(program, only=["*.query"], skip=["block.0.*"]) == both[1:]
    assert selected(program, only=["*.query"], skip=["layer.1.self.query"]) == both[:1]
    assert selected(program, only=["block.1.ffn.up", "pooler"]) == ["layer.1.up", "pooler"]
    assert selected(program) == [s.name for s in sites(program)]
    assert selected(program, only=["layer.[0-1].up"]) == ["layer.0.up", "layer.1.up"]


def test_patterns_may_match_nothing_but_names_must_exist():
    program = small_models.bert()
    assert selected(program, only=["decoder.*"]) == []
    for globs in ({"only": ["block.0.attention.querry"]}, {"skip": ["block.0.attention.querry"]}):
        with pytest.raises(InputError, match="no site 'block.0.attention.querry'\n.*block.0.attention.query"):
            select(program, **globs)
    with pytest.raises(InputError, match="no site 'zzz'\n.*tersor.ir.sites"):
        find_site(program, "zzz")


def test_sites_of_several_functions():
    program = small_models.bert()
    other = small_models.gpt2().main.copy(program.parameters)
    other.name = "decode"
    program.functions["decode"] = other
    found = select(program, only=["block.0.attention.output"])
    assert [(s.function, s.name) for s in found] == [("main", "layer.0.dense"), ("decode", "h.0.c_proj")]
    assert [s.function for s in select(other, only=["block.0.*"])][0] == "decode"


# -- rewriting


def test_names_survive_rewriting():
    program = small_models.bert()
    function = program.main
    for node in function.calls("linear"):
        build = function.builder(before=node, made_by="test")
        x, weight, bias = node.args
        function.replace(node, build.add(build.linear(x, weight), bias))
    for node in function.calls("gelu"):
        function.replace(node, function.builder(before=node).relu(node.args[0]))
    assert selected(program, only=["layer.1.up"]) == ["layer.1.up"]
    assert find_site(program, "layer.1.up").node.target.name == "add"
    assert find_site(program, "block.1.ffn.activation").node.target.name == "relu"


def test_structural_names_do_not_depend_on_given_ones():
    program, bare = small_models.encoder_decoder(), small_models.encoder_decoder()
    for node in bare.main.calls():
        node.meta.pop("site", None)
        node.meta["module"] = "anything"
    with_names = {n.name: s for n, s in structural_names(program.main).items()}
    assert {n.name: s for n, s in structural_names(bare.main).items()} == with_names


@pytest.mark.parametrize("name", small_models.ALL)
def test_names_are_unique_and_every_weight_has_one(name):
    program = small_models.ALL[name]()
    found = structural_names(program.main)
    assert len(set(found.values())) == len(found)
    for node in program.main.calls("linear", "layer_norm", "rms_norm", "embedding", "conv2d", "attention"):
        assert node in found
