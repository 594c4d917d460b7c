"""The table of operations: lookup, registration by third parties, calls that do not fit."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import ProgramError
from tersor.ir import Dim, Program, Value, ops, register_op, verify
from tersor.ir.dialect import Dialect, Op
from tersor.ir.program import infer

X = Value("float32", (2, Dim.symbol("n")))


@pytest.fixture
def own_ops(monkeypatch):
    """Operations registered by a test do not stay."""
    monkeypatch.setattr(ops, "_ops", dict(ops._ops))
    monkeypatch.setattr(ops, "_captures", dict(ops._captures))


def test_lookup():
    assert ops.linear is ops.get("linear")
    assert "linear" in ops and "no_such" not in ops
    assert ops.linear.operands == ("x", "weight", "bias")
    assert {"heads", "kv_heads", "scale", "causal"} <= set(ops.attention.attributes)
    with pytest.raises(AttributeError):
        ops.no_such  # noqa: B018
    with pytest.raises(ProgramError, match="no_such.*\n.*\n.*install the package"):
        ops.get("no_such")


def test_bind_fills_in_defaults():
    assert ops.layer_norm.bind(("x",), {"eps": 1.0}) == {"x": "x", "weight": None, "bias": None, "eps": 1.0}


@pytest.mark.parametrize(
    ("operands", "attributes", "said"),
    [
        ((X,), {}, "weight"),
        ((X, X, X, X), {}, "too many"),
        ((X, X), {"eps": 1}, "eps"),
        ((X,), {"weight": X}, "by position.*weight"),
        ((3, X), {}, r"linear\(3, float32\[2, n\]\)"),
        ((X, None), {}, r"linear\(float32\[2, n\], None\)"),
    ],
)
def test_calls_that_do_not_fit(operands, attributes, said):
    with pytest.raises(ProgramError, match=said):
        infer(ops.linear, operands, attributes)


def test_a_missing_attribute_is_named():
    with pytest.raises(ProgramError, match="heads"):
        infer(ops.attention, (X, X, X), {"kv_heads": 1, "scale": 1.0})


def scaled(x, y=None, *, factor: float = 2.0):
    """x * factor + y."""
    return x * factor + (0 if y is None else y)


def decompose_scaled(build, x, y=None, *, factor=2.0):
    product = build.mul(x, factor)
    return product if y is None else build.add(product, y)


def test_an_operation_with_a_decomposition_needs_no_shape_rule(own_ops):
    op = register_op("test.scaled", scaled, decompose=decompose_scaled, captures=("some torch op",))
    assert infer(op, (X, Value("float32", (3, 1, 1))), {}) == Value("float32", (3, 2, Dim.symbol("n")))
    assert ops.captured("some torch op") is op and op.doc == "x * factor + y."
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (2,)))
    function.set_outputs({"y": function.builder().emit("test.scaled", x, factor=3.0)})
    verify(program)
    assert program(x=torch.ones(2))["y"].tolist() == [3.0, 3.0]


def test_a_decomposition_over_several_values(own_ops):
    op = register_op(
        "test.join", lambda xs: torch.cat(xs), decompose=lambda build, xs: build.concat(xs, dim=0)
    )
    assert infer(op, ((X, X),), {}) == Value("float32", (4, Dim.symbol("n")))


def test_an_operation_with_a_rule(own_ops):
    op = register_op(
        "test.double", lambda x: 2 * x, infer=lambda x: x, macs=lambda result, x: 7, bytes=lambda result, x: 5,
        elementwise="mul",
    )  # fmt: skip
    assert (op.macs(X, X), op.bytes(X, X), op.elementwise, op.decompose) == (7, 5, "mul", None)


def test_registration_errors(own_ops):
    with pytest.raises(ProgramError, match="twice"):
        register_op("linear", scaled, infer=lambda *_: X)
    with pytest.raises(ProgramError, match="neither a shape rule nor a decomposition"):
        register_op("test.none", scaled)
    register_op("test.first", scaled, decompose=decompose_scaled, captures=("aten.x",))
    with pytest.raises(ProgramError, match="captured by 'test.first' already"):
        register_op("test.second", scaled, decompose=decompose_scaled, captures=("aten.x",))
    assert "test.second" not in ops


def test_a_failing_rule_is_a_program_error():
    def rule(x):
        raise ZeroDivisionError("oops")

    with pytest.raises(ProgramError, match="oops") as caught:
        infer(Op("bad", lambda x: x, rule), (X,), {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_dialect_iterates_in_order_of_registration():
    dialect = Dialect()
    made = [dialect.register(Op(name, lambda x: x, lambda x: x)) for name in ("b", "a")]
    assert list(dialect) == made
