"""Programs of several functions that keep state, through the front door and the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tersor
from tersor.cli import main
from tersor.ir import Program, Value


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
