"""Programs of several functions that keep state, through the front door and the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tersor
from tersor.cli import main
from tersor.errors import InputError
from tersor.frontends.static_cache import WithStaticCache
from tersor.ir import Program, Value, run
from tersor.passes.recipes import get as get_recipe
from tests.frontends.decoders import Decoder

ROOM = 16


def program() -> Program:
    """`add` adds x to a running sum, `look` gives it."""
    made = Program()
    for name in ("add", "look"):
        function = made.add_function(name)
        x, total = (
            function.add_input("x", Value("float32", (3,))),
            function.add_state("total", Value("float32", (3,))),
        )
        build = function.builder()
        if name == "add":
            new = build.add(total, x)
            function.set_outputs({"y": build.mul(new, math.pi)}, {"total": new})
        else:
            function.set_outputs({"y": build.add(build.mul(total, math.pi), x)})
    return made


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateful")
    compiled = tersor.compile(program(), output=folder / "sum.tersor", threads=1)
    return compiled, folder / "sum.tersor"


def test_functions_share_their_states(artifact):
    compiled, folder = artifact
    for model in (compiled, tersor.load(folder, threads=1)):
        session, x = model.session(), np.arange(3, dtype=np.float32)
        session.add(x=x)
        session.add(x=x)
        np.testing.assert_allclose(session.look(x=0 * x)["y"], 2 * math.pi * x, rtol=1e-6)


def test_the_command_line_names_functions(artifact, tmp_path, capsys):
    _, folder = artifact
    np.savez(tmp_path / "x.npz", x=np.ones(3, np.float32))
    out = tmp_path / "y.npz"
    assert (
        main(
            [
                "run",
                str(folder),
                "--input",
                str(tmp_path / "x.npz"),
                "--output",
                str(out),
                "--function",
                "add",
            ]
        )
        == 0
    )
    np.testing.assert_allclose(np.load(out)["y"], np.full(3, math.pi), rtol=1e-6)
    assert main(["bench", str(folder), "--calls", "3", "--function", "add"]) == 0
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "ms median" in said and "look(x: float32[3]) -> y: float32[3]\n  state total: float32[3]" in said
    for command in (["run", str(folder), "--input", str(tmp_path / "x.npz")], ["bench", str(folder)]):
        for more, wrong in (([], "no function 'main'"), (["--function", "sub"], "no function 'sub'")):
            assert main([*command, *more]) != 0
            error = capsys.readouterr().err
            assert wrong in error and "--function add or look" in error


def test_states_are_not_compared_with_other_engines(tmp_path, capsys):
    one = program()
    del one.functions["look"]
    tersor.compile(one, output=tmp_path / "sum.tersor", threads=1)
    command = ["bench", str(tmp_path / "sum.tersor"), "--against", "torch", "--model", str(tmp_path)]
    assert main(command) != 0
    assert "keeps state" in capsys.readouterr().err


# -- decoders, captured and compiled


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return WithStaticCache(model, ROOM), "input_ids", lambda ids: model(ids).logits


def by_hand():
    model = Decoder().eval()
    return model, "ids", lambda ids: model.clear()(ids, torch.tensor(0))


@pytest.mark.parametrize("make", [by_hand, llama])
def test_prefill_and_decode_equal_the_whole(make, tmp_path):
    model, name, whole = make()
    ids = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        expected = whole(ids)
    if make is by_hand:
        model.clear()
    start = torch.tensor(0)
    captured = tersor.capture(
        model, {name: ids[:, :7], "position": start}, {name: {1: ("length", 1, ROOM)}}, name="prefill"
    )
    tersor.capture(model, {name: ids[:, :1], "position": start}, name="decode", into=captured)
    compiled = tersor.compile(captured, recipe="fp32", threads=1)
    assert compiled.manifest.verified
    compiled.save(tmp_path / "decoder.tersor")
    for artifact in (compiled, tersor.load(tmp_path / "decoder.tersor", threads=1)):
        session = artifact.session()
        for _ in range(2):
            parts = [session.prefill(**{name: ids[:, :7]}, position=0)[0]]
            parts += [session.decode(**{name: ids[:, at : at + 1]}, position=at)[0] for at in range(7, 12)]
            error = (torch.cat(parts, 1) - expected).abs().max() / expected.abs().max()
            assert error < 1e-4
            session.reset()
    with pytest.raises(InputError, match="no room"):
        session.prefill(**{name: ids}, position=ROOM - 3)


def test_the_recipe_leaves_what_is_stored_alone():
    model, name, _ = by_hand()
    model.clear()
    before = tersor.capture(model, {name: torch.ones(1, 4, dtype=torch.int64), "position": torch.tensor(0)})
    after, report = get_recipe("fp32").run(before)
    assert after.states == before.states
    ids, start = torch.randint(0, 50, (1, 4)), torch.tensor(3)
    kept = [before.zero_states(), after.zero_states()]
    for _ in range(2):
        results = [
            run(p.main, {name: ids, "position": start}, s)["output"]
            for p, s in zip((before, after), kept, strict=True)
        ]
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)
        torch.testing.assert_close(*kept, atol=1e-5, rtol=0)
