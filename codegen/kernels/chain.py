"""Element-wise work as data: a small SSA program over lanes, composed into kernels as an epilogue or run by itself.

A chain is hashable, so kernels with equal chains are shared between layers and found again in the tuning database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

InputKind = Literal["accumulator", "full", "column", "row", "scalar"]

OPS: dict[str, int] = {  # name -> number of operands
    "add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "min": 2, "pow": 2,
    "neg": 1, "abs": 1, "square": 1, "sqrt": 1, "rsqrt": 1, "reciprocal": 1, "exp": 1, "log": 1, "floor": 1,
    "round": 1, "gelu_sigmoid": 1,
    "cos": 1, "sin": 1, "tanh": 1, "erf": 1, "sigmoid": 1, "gelu_erf": 1, "gelu_tanh": 1, "silu": 1, "relu": 1,
    "where": 3, "cast": 1, "saturate": 1, "eq": 2, "ne": 2, "lt": 2, "le": 2, "gt": 2, "ge": 2,
    "logical_and": 2, "logical_or": 2, "logical_not": 1,
}  # fmt: skip

CODES: dict[str, tuple[float, float]] = {"uint8": (0.0, 255.0), "int8": (-128.0, 127.0)}
"""Lowest and highest value of each dtype of quantized codes."""


@dataclass(frozen=True)
class Const:
    """A Python constant as an operand of a step."""

    value: float | int | bool


@dataclass(frozen=True)
class ChainInput:
    """One value that enters the chain.

    kind: "accumulator" (in registers already), "full" ([..., N], like the output), "column" ([N]),
    "row" ([..., 1]) or "scalar" (shape ()).
    """

    kind: InputKind
    dtype: str = "float32"


@dataclass(frozen=True)
class Step:
    """``op(*args)``; an int argument is the index of an earlier value.

    ``dtype`` is the target of a "cast" (a float is cut towards zero) or of a "saturate" (an integral float is limited
    to the range of "uint8" or "int8" first; NaN becomes the lowest code). "round" rounds half to even. So a
    requantization is ``saturate(round(x * multiplier) + zero_point)``.
    """

    op: str
    args: tuple[int | Const, ...]
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.op == "saturate" and self.dtype not in CODES:
            raise ValueError(f"cannot saturate to {self.dtype!r}, only to {', '.join(CODES)}")
        if OPS.get(self.op) != len(self.args):
            raise ValueError(f"chain step {self.op!r} with {len(self.args)} operands")


@dataclass(frozen=True)
class Chain:
    """Values are numbered: the inputs first, then one per step; ``outputs`` names those that leave the chain."""

    inputs: tuple[ChainInput, ...]
    steps: tuple[Step, ...] = ()
    outputs: tuple[int, ...] = ()

    def maker(self, value: int | Const, op: str) -> Step | None:
        """The step that computes a value, where it is this operation."""
        if isinstance(value, Const) or value < len(self.inputs):
            return None
        step = self.steps[value - len(self.inputs)]
        return step if step.op == op else None

    def label(self) -> str:
        """The steps' names for a kernel's symbol, for example ``add_gelu_erf``."""
        return "_".join(step.op for step in self.steps)


def split_starts(chain: Chain) -> tuple[tuple[int, ...], Chain]:
    """What sums of integers may start from: for every accumulator the number of the int32 column that is added to it
    before all else, and the chain without these additions; none, and the whole chain, where one has no such column.

    Sums of integers are the same in any order, so nothing changes by it.
    """
    accumulators = [i for i, value in enumerate(chain.inputs) if value.kind == "accumulator"]
    columns = {i for i, value in enumerate(chain.inputs) if value == ChainInput("column", "int32")}
    count, found = len(chain.inputs), {}
    for number, step in enumerate(chain.steps, count):
        if step.op == "add" and step.args[0] in accumulators and step.args[1] in columns:
            found[step.args[0]] = (number, step.args[1])
    read = [arg for step in chain.steps for arg in step.args] + list(chain.outputs)
    whole = all(chain.inputs[i].dtype == "int32" and read.count(i) == 1 for i in accumulators)
    if not whole or len(found) < len(accumulators):
        return (), chain
    removed = {number: i for i, (number, _) in found.items()}
    kept = [number for number in range(count + len(chain.steps)) if number not in removed]
    moved = {number: at for at, number in enumerate(kept)} | removed

    def renumbered(arg: int | Const) -> int | Const:
        return arg if isinstance(arg, Const) else moved[arg]

    steps = [chain.steps[number - count] for number in kept[count:]]
    steps = [Step(step.op, tuple(map(renumbered, step.args)), step.dtype) for step in steps]
    outputs = tuple(moved[i] for i in chain.outputs)
    return tuple(found[i][1] for i in accumulators), Chain(chain.inputs, tuple(steps), outputs)


PLAIN = Chain((ChainInput("accumulator"),), (), (0,))
"""The epilogue that leaves f32 accumulators as they are."""
