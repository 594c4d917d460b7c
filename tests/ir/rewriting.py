"""Small functions, rewritten and compared with themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tersor.ir import Dim, Program, Range, Value, run, verify
from tersor.ir.canonicalize import canonicalize
from tersor.ir.matching import Rule, RuleReport, apply_rules

B, T = Dim.symbol("batch"), Dim.symbol("length")
DIMS = {"batch": Range(1, 4), "length": Range(1, 40)}


def program_of(
    make: Callable[..., Any], inputs: Mapping[str, Value], dims: Mapping[str, Range] | None = None
) -> Program:
    """A program whose result is ``make(build, *input nodes)``."""
    program = Program()
    function = program.add_function("main", dims if dims is not None else DIMS)
    nodes = [function.add_input(name, value) for name, value in inputs.items()]
    function.set_outputs({"y": make(function.builder(), *nodes)})
    verify(program)
    return program


def sample(program: Program, batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """Random inputs; integers are 0 or 1, and the first of each row is 1."""
    generator = torch.Generator().manual_seed(length)
    values = {}
    for name, value in program.main.inputs.items():
        shape = [
            d.evaluate({"batch": batch, "length": length}) if isinstance(d, Dim) else d for d in value.shape
        ]
        if value.is_float:
            values[name] = torch.randn(shape, generator=generator, dtype=value.torch_dtype)
        else:
            values[name] = torch.randint(0, 2, shape, generator=generator).to(value.torch_dtype)
            values[name][..., 0] = 1
    return values


def names(program: Program) -> list[str]:
    return [n.target.name for n in program.main.calls()]


def rewritten(program: Program, rules: Sequence[Rule]) -> RuleReport:
    """Applies rules and checks that the values stay the same at several sizes."""
    return _checked(program, lambda: apply_rules(program.main, rules))


def canonical(program: Program) -> list[str]:
    """Canonicalises and checks that the values stay the same at several sizes; returns the notes."""
    return _checked(program, lambda: canonicalize(program))


def _checked(program: Program, change: Callable[[], Any]) -> Any:
    sizes = (
        [(1, 1), (3, 7), (2, 40)]
        if any(v.shape and _named(v) for v in program.main.inputs.values())
        else [(1, 1)]
    )
    samples = [sample(program, *s) for s in sizes]
    before = [run(program.main, s)["y"] for s in samples]
    result = change()
    verify(program)
    for inputs, expected in zip(samples, before, strict=True):
        actual = run(program.main, inputs)["y"]
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return result


def _named(value: Value) -> bool:
    return any(isinstance(d, Dim) for d in value.shape)
