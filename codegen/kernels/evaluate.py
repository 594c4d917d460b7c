"""Chains as code: each step becomes an expression over scalars or vectors, bound to a register."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr

from tersor.codegen.kernels import avx512, math
from tersor.codegen.kernels.chain import Chain, Const, Step
from tersor.targets import Target

Operand = Expr | Const


def evaluate_chain(chain: Chain, values: list[Expr], target: Target) -> list[Expr]:
    """The chain's outputs for the given values of its inputs (scalars, or vectors with one number of lanes).

    Scalars beside vectors are broadcast. Every step is bound to a register of the PrimFunc under construction.
    """
    lanes = max((math.lanes_of(value) for value in values), default=1)
    known = [math.bind(math.broadcast(value, lanes)) for value in values]
    for step in chain.steps:
        operands = [a if isinstance(a, Const) else known[a] for a in step.args]
        if step.op == "cast":
            result = math.cast(_materialize(operands[0], "float32", lanes), step.dtype or "float32")
        elif step.op == "saturate":
            result = _saturate(chain, step, known, lanes, target)
        elif step.op == "pow":
            result = math.power(_materialize(operands[0], "float32", lanes), operands[1])
        else:
            result = _function(step.op, lanes, target)(*_promote(operands, lanes))
        known.append(math.bind(result))
    return [known[index] for index in chain.outputs]


def _saturate(chain: Chain, step: Step, known: list[Expr], lanes: int, target: Target) -> Expr:
    """Codes; with the rounding and the zero point in front of them, where the target has instructions for all that."""

    def value(arg: int | Const) -> Expr:
        known_or_constant = arg if isinstance(arg, Const) else known[arg]
        return math.cast(_materialize(known_or_constant, "float32", lanes), "float32")

    if _speaks_avx512(lanes, target) and step.dtype == "uint8":
        added = chain.maker(step.args[0], "add")
        rounded = added and chain.maker(added.args[0], "round")
        if rounded:
            return avx512.quantize(value(rounded.args[0]), value(added.args[1]))
    return math.saturate(value(step.args[0]), step.dtype)


def _function(op: str, lanes: int, target: Target) -> Callable[..., Expr]:
    """The function of a step, by the target's own instructions where it has some for it."""
    if _speaks_avx512(lanes, target) and op in AVX512:
        return _integer_or_float(AVX512[op])
    return FUNCTIONS[op]


def _speaks_avx512(lanes: int, target: Target) -> bool:
    return lanes == avx512.LANES and avx512.speaks(target)


def output_dtypes(chain: Chain) -> tuple[str, ...]:
    """The dtypes of the chain's outputs."""
    known = [value.dtype for value in chain.inputs]
    for step in chain.steps:
        operands = [a if isinstance(a, Const) else known[a] for a in step.args]
        if step.op in ("cast", "saturate"):
            known.append(step.dtype or "float32")
        elif step.op in ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"):
            known.append("bool")
        elif step.op in ("add", "sub", "mul", "max", "min", "neg", "abs", "square", "floor", "round", "relu",
                         "where"):  # fmt: skip
            known.append(_common_dtype(operands[1:] if step.op == "where" else operands))
        elif step.op == "pow" and isinstance(step.args[1], Const) and float(step.args[1].value).is_integer():
            known.append(_common_dtype(operands[:1]))
        else:
            known.append("float32")
    return tuple(known[index] for index in chain.outputs)


def _logical(operation: Callable[..., Expr]) -> Callable[..., Expr]:
    return lambda *operands: operation(*(math.cast(o, "bool") for o in operands))


def _comparison(operation: Callable[..., Expr]) -> Callable[..., Expr]:
    def compare(*operands: Expr) -> Expr:
        # LLVM has no ordered comparison of bools
        return operation(*(math.cast(o, "int32") if math.element_of(o) == "bool" else o for o in operands))

    return compare


def _integer_or_float(float_function: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
    return lambda x: float_function(math.cast(x, "float32"))


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": math.divide,
    "max": math.maximum,
    "min": math.minimum,
    "neg": lambda x: math.constant(0, x) - x if not math.is_float(x) else x * -1.0,
    "abs": math.absolute,
    "square": lambda x: (lambda v: v * v)(math.bind(x)),
    "floor": math.floor,
    "round": math.round_even,
    "relu": math.relu,
    "where": math.where,
    "eq": _comparison(tirx.EQ),
    "ne": _comparison(tirx.NE),
    "lt": _comparison(tirx.LT),
    "le": _comparison(tirx.LE),
    "gt": _comparison(tirx.GT),
    "ge": _comparison(tirx.GE),
    "logical_and": _logical(tirx.And),
    "logical_or": _logical(tirx.Or),
    "logical_not": _logical(tirx.Not),
    "sqrt": _integer_or_float(tirx.sqrt),
    "rsqrt": _integer_or_float(lambda x: 1.0 / tirx.sqrt(x)),
    "reciprocal": _integer_or_float(lambda x: 1.0 / x),
    "exp": _integer_or_float(math.exp),
    "log": _integer_or_float(math.log),
    "sin": _integer_or_float(math.sin),
    "cos": _integer_or_float(math.cos),
    "tanh": _integer_or_float(math.tanh),
    "erf": _integer_or_float(math.erf),
    "sigmoid": _integer_or_float(math.sigmoid),
    "gelu_erf": _integer_or_float(math.gelu_erf),
    "gelu_tanh": _integer_or_float(math.gelu_tanh),
    "gelu_sigmoid": _integer_or_float(math.gelu_sigmoid),
    "silu": _integer_or_float(math.silu),
}
"""Every op of ``chain.OPS`` but ``cast``, ``saturate`` and ``pow``, which need more than values."""

AVX512 = {"exp": avx512.exp, "gelu_erf": avx512.gelu_erf, "gelu_tanh": avx512.gelu_tanh}
"""Operations for which AVX-512 has instructions."""


def _promote(operands: list[Operand], lanes: int) -> list[Expr]:
    """Operands of one step in their common dtype; the condition of a ``where`` keeps its own."""
    condition = operands[:1] if len(operands) == 3 else []
    rest = operands[len(condition) :]
    dtype = _common_dtype([o if isinstance(o, Const) else math.element_of(o) for o in rest])
    return [_materialize(o, "bool", lanes) for o in condition] + [
        math.cast(_materialize(o, dtype, lanes), dtype) for o in rest
    ]


def _common_dtype(operands: list[str | Const]) -> str:
    """f32 (for bf16 too) before integers (the wider first) before bool; a constant counts by its Python type, but never
    widens."""
    dtypes = {o for o in operands if isinstance(o, str)}
    constants = {type(o.value) for o in operands if isinstance(o, Const)}
    if any("float" in dtype for dtype in dtypes) or float in constants:
        return "float32"
    if dtypes - {"bool"}:
        return max(dtypes - {"bool"}, key=lambda name: int(name.lstrip("uint")))
    return "int64" if int in constants else "bool"


def _materialize(operand: Operand, dtype: str, lanes: int) -> Expr:
    if isinstance(operand, Const):
        return tirx.const(operand.value, dtype if lanes == 1 else f"{dtype}x{lanes}")
    return operand
