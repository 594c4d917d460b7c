"""Programs as text, and what differs between two."""

from __future__ import annotations

import pytest
import small_models
import torch

from tersor.ir import Dim, Program, Range, Value, diff, print_program
from tersor.ir.text import human_bytes, human_count

N = Dim.symbol("n")


def tiny() -> Program:
    program = Program()
    function = program.add_function("main", {"n": Range(1, 9)})
    x = function.add_input("x", Value("float32", (N, 4)))
    build = function.builder()
    weight = build.parameter("layer.w", torch.ones(4, 4))
    y = build.linear(x, weight, None, site="layer")
    y.meta.update(module="layer", source="model.py:7", made_by="fuse")
    y = build.concat((build.reshape(y, shape=(N * 2, 2)),), dim=0)
    function.set_outputs({"y": build.layer_norm(y, eps=1e-5), "z": build.mul(y, 2.0)})
    program.parameters["tied"] = program.parameters["layer.w"]
    return program


def test_print():
    assert str(tiny()) == print_program(tiny()) == (
        "main(x: float32[n, 4]) dims n 1..9\n"
        "  %linear = linear(%x, @layer.w)  : float32[n, 4]  # layer\n"
        "  %reshape = reshape(%linear, shape=(2*n, 2))  : float32[2*n, 2]\n"
        "  %concat = concat((%reshape,), dim=0)  : float32[2*n, 2]\n"
        "  %layer_norm = layer_norm(%concat)  : float32[2*n, 2]\n"
        "  %mul = mul(%concat, 2.0)  : float32[2*n, 2]\n"
        "  return y = %layer_norm, z = %mul\n"
        "\n"
        "parameters: 2 tensors, 64 B\n"
        "  layer.w  float32[4, 4]  64 B\n"
        "  tied     float32[4, 4]  tied with layer.w"
    )  # fmt: skip


def test_detail():
    full, brief = print_program(tiny(), "full"), print_program(tiny(), "brief")
    assert "# layer, model.py:7, by fuse" in full
    assert "#" not in brief and "parameters" not in brief and "%linear = " in brief


@pytest.mark.parametrize("name", small_models.ALL)
def test_every_operation_has_a_line(name):
    program = small_models.ALL[name]()
    text = print_program(program)
    for node in program.main.calls():
        assert f"  %{node.name} = {node.target.name}(" in text
    for parameter in program.parameters:
        assert f"@{parameter}" in text and f"\n  {parameter} " in text


def test_nothing_differs():
    assert diff(tiny(), tiny()) == ""
    program = tiny()
    program.main.calls("mul")[0].meta["site"] = "anything"
    program.main.calls("mul")[0]._rename("product")
    assert diff(tiny(), program) == ""


def changed(text, sign):
    return [line[1:] for line in text.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)]


def test_a_replaced_operation():
    program = tiny()
    (old,) = program.main.calls("concat")
    program.main.replace(old, program.main.builder(before=old).neg(old.args[0][0]))
    text = diff(tiny(), program)
    assert changed(text, "-") == [
        "%concat = concat((%reshape,), dim=0)  : float32[2*n, 2]",
        "%layer_norm = layer_norm(%concat)  : float32[2*n, 2]",
        "%mul = mul(%concat, 2.0)  : float32[2*n, 2]",
    ]
    assert changed(text, "+") == [
        "%neg' = neg(%reshape)  : float32[2*n, 2]",
        "%layer_norm = layer_norm(%neg')  : float32[2*n, 2]",
        "%mul = mul(%neg', 2.0)  : float32[2*n, 2]",
    ]


def test_an_inserted_operation_leaves_the_rest_alone():
    program = small_models.bert()
    first = program.main.calls("add")[0]
    program.main.replace(first, program.main.builder(before=program.main.calls("layer_norm")[0]).neg(first))
    text = diff(small_models.bert(), program)
    assert len(changed(text, "+")) == 2 and len(changed(text, "-")) == 1


def test_changed_parameters_differ_by_content():
    program = tiny()
    program.parameters["layer.w"] = torch.zeros(4, 4)
    text = diff(tiny(), program)
    before, after = tiny().parameters["layer.w"].digest[:8], program.parameters["layer.w"].digest[:8]
    assert f"-%linear = linear(%x, @layer.w#{before})" in text
    assert f"+%linear = linear(%x, @layer.w#{after})" in text


def test_signature_results_and_functions_differ():
    program = tiny()
    program.main.dims["n"] = Range(1, 5)
    program.main.set_outputs({"y": program.main.results[1]})
    second = program.add_function("second")
    second.set_outputs({"y": second.builder().full(shape=(1,), value=0, dtype="int64")})
    text = diff(tiny(), program)
    assert "+main(x: float32[n, 4]) dims n 1..5" in text
    assert "-return y = %layer_norm, z = %mul" in text and "+return y = %mul" in text
    assert "+function second" in text and "-function second" in diff(program, tiny())


def test_results_and_dead_nodes_are_enough_to_differ():
    program = tiny()
    program.main.builder().neg(program.main.calls("mul")[0])
    assert "+%neg' = neg(%mul)" in diff(tiny(), program)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (90_900_000, "90.9 MB"), (2 * 10**12, "2.0 TB"),
     (5 * 10**15, "5000.0 TB")],
)  # fmt: skip
def test_human_bytes(size, text):
    assert human_bytes(size) == text


def test_human_count():
    assert [human_count(n) for n in (7, 1500, 11_173_625_856)] == ["7", "1.5 k", "11.2 G"]
