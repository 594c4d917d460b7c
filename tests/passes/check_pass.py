"""The same treatment for every pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from tersor.ir import Parameter, Program, Value, verify
from tersor.ir.program import infer
from tersor.passes import Context, Lossy, Pass, Pipeline
from tersor.passes.numerics import outputs, relative_error, small_inputs
from tersor.passes.registry import make

ROUNDING = 1e-12
"""What a fold may differ by when its parameters, too, are float64."""


def check_pass(
    pass_: Pass,
    before: Program,
    expected: Program | None,
    *,
    unmatched: Program,
    idempotent: bool = True,
    calibration: Any = None,
    reference: Program | None = None,
) -> Program:
    """Runs a pass on ``before`` and checks everything that holds for every pass.

    Args:
        expected: what must come out, compared operation by operation; None where only the rest is checked.
        calibration: data for ``before`` and ``unmatched``, where the pass needs some.
        reference: what a pass that recovers works towards.
        unmatched: a program on which the pass must do nothing, and say why where it acts on operations that are there.

    Returns:
        What came out.
    """
    check_documentation(type(pass_))
    check_config(pass_)
    after = apply(pass_, before, calibration, reference)
    if expected is not None:
        assert_same_structure(after, expected)
    check_metadata(before, after)
    check_float64(pass_, before, calibration)
    assert apply(pass_, before, calibration, reference).digest() == after.digest(), "two runs differ"
    if idempotent:
        assert apply(pass_, after, calibration, reference) is after, "the second run changed something"
    check_unmatched(pass_, unmatched, calibration, reference)
    return after


def apply(
    pass_: Pass, program: Program, calibration: Any = None, reference: Program | None = None
) -> Program:
    """Runs one pass with all of the manager's checks; the program given must stay as it is."""
    contents = _contents(program)
    context = Context(numerics="always", reference=reference)
    after, report = Pipeline([pass_]).run(program, context, calibration=calibration)
    assert _contents(program) == contents, "the pass touched the program of the user"
    (step,) = report.steps
    assert step.modified == bool(step.changes) == (after is not program)
    assert not step.notes
    return after


def check_documentation(cls: type[Pass]) -> None:
    doc = inspect.getdoc(cls) or ""
    for word in ("Before:", "After:", "legal", "Source:"):
        assert word.lower() in doc.lower(), f"the docstring of {cls.__name__} has no {word}"


def check_config(pass_: Pass) -> None:
    assert type(pass_).from_config(pass_.config()) == pass_
    assert make({"pass": pass_.name, **pass_.config()}) == pass_
    assert hash(type(pass_).from_config(pass_.config())) == hash(pass_)


def check_metadata(before: Program, after: Program) -> None:
    verify(after)
    for name, function in after.functions.items():
        old = {n.meta["site"]: n for n in before.functions[name].calls() if "site" in n.meta}
        new = {n.meta["site"]: n for n in function.calls() if "site" in n.meta}
        assert new.keys() <= old.keys()
        for site, node in new.items():
            assert node.meta.get("module") == old[site].meta.get("module")
        if len(function.calls()) == len(before.functions[name].calls()):
            assert new.keys() == old.keys(), "a place lost its name"


def check_float64(pass_: Pass, before: Program, calibration: Any = None) -> None:
    """With float64 parameters nothing is left of a difference but the rounding of float64 itself."""
    if isinstance(pass_.numerics, Lossy):
        return
    precise = in_float64(before)
    changed, _ = Pipeline([pass_]).run(precise, calibration=calibration)
    inputs = {
        name: {k: t.double() if t.is_floating_point() else t for k, t in given.items()}
        for name, given in small_inputs(before, seed=1).items()
    }
    reference, actual = outputs(precise, inputs), outputs(changed, inputs)
    assert relative_error(reference, actual) <= ROUNDING


def check_unmatched(
    pass_: Pass, unmatched: Program, calibration: Any = None, reference: Program | None = None
) -> None:
    after, report = Pipeline([pass_]).run(unmatched, Context(reference=reference), calibration=calibration)
    assert after is unmatched, "it must not match"
    (step,) = report.steps
    assert step.status == "unchanged" and not step.changes
    assert all(skip.reason for skip in step.skips)


def in_float64(program: Program) -> Program:
    """The program with float64 parameters and inputs."""
    copy = program.copy()
    for name, parameter in program.parameters.items():
        if parameter.value.is_float:
            copy.parameters[name] = Parameter(parameter.tensor.double())
    for function in copy.functions.values():
        for node in function.nodes:
            if node.op == "placeholder" and node.meta["value"].is_float:
                node.meta["value"] = Value("float64", node.meta["value"].shape)
            elif node.op == "get_attr":
                node.meta["value"] = copy.parameters[node.target].value
            elif node.op == "call_function":
                if node.kwargs.get("dtype") == "float32":
                    node.kwargs = node.kwargs | {"dtype": "float64"}
                node.meta["value"] = infer(node.target, node.args, node.kwargs)
        function.set_outputs(dict(zip(function.outputs, function.results, strict=True)))
    verify(copy)
    return copy


def assert_same_structure(actual: Program, expected: Program) -> None:
    """Operations, attributes, operands and sites are equal, and parameters to float32 rounding."""
    assert actual.functions.keys() == expected.functions.keys()
    for name, function in expected.functions.items():
        other = actual.functions[name]
        assert other.inputs == function.inputs and other.outputs == function.outputs
        calls, wanted = other.calls(), function.calls()
        assert [n.target.name for n in calls] == [n.target.name for n in wanted]
        pair: dict[fx.Node, fx.Node] = dict(
            zip(
                other.graph.find_nodes(op="placeholder"),
                function.graph.find_nodes(op="placeholder"),
                strict=True,
            )
        )
        for a, b in zip(calls, wanted, strict=True):
            pair[a] = b
            where = f"%{b.name} ({b.target.name})"
            assert a.meta["value"] == b.meta["value"], where
            assert a.meta.get("site") == b.meta.get("site"), where
            assert a.kwargs == b.kwargs, where
            assert _operands_agree(other, function, _trimmed(a.args), _trimmed(b.args), pair), (
                f"operands of {where}"
            )
        assert [pair[r] for r in other.results] == list(function.results)


def _operands_agree(actual: Any, expected: Any, a: Any, b: Any, pair: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(b, tuple | list):
        return (
            isinstance(a, tuple | list)
            and len(a) == len(b)
            and all(_operands_agree(actual, expected, x, y, pair) for x, y in zip(a, b, strict=True))
        )
    if isinstance(b, fx.Node) and b.op == "get_attr":
        x, y = actual.parameter(a), expected.parameter(b)
        return x is not None and x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-6)
    return pair.get(a) is b if isinstance(b, fx.Node) else a == b


def _trimmed(args: tuple) -> tuple:
    """Without absent operands at the end."""
    while args and args[-1] is None:
        args = args[:-1]
    return args


def _contents(program: Program) -> tuple:
    """A fresh hash of everything, so that a parameter written in place shows."""
    return program.digest(), {n: Parameter(p.tensor).digest for n, p in program.parameters.items()}
