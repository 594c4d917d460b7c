"""The C source of an exported model: its header, one C function per function of the program, an example."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tersor.codegen.export import SOURCES
from tersor.codegen.export.functions import PlainKernel
from tersor.codegen.export.launchers import NUMBERS, declarations, launchers
from tersor.codegen.export.plan import SIZE, FunctionPlan, Step
from tersor.codegen.runtime.manifest import TensorType

_KEYWORDS = frozenset(
    "alignas alignof and and_eq asm atomic auto bitand bitor bool break case catch char class compl concept const"
    " consteval constexpr constinit continue decltype default delete do double dynamic_cast else enum explicit export"
    " extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator"
    " or or_eq private protected public register reinterpret_cast requires restrict return short signed sizeof static"
    " static_assert static_cast struct switch template this thread_local throw true try typedef typeid typename union"
    " unsigned using virtual void volatile wchar_t while xor xor_eq".split()
)
"""Of C and of C++, whose compilers read the header too."""

_TAKEN = frozenset(
    "message model model_open model_use model_check model_close session session_bytes session_create session_reset"
    " session_destroy options enter leave parallel pool_bytes pool_start pool_stop flag_set flag_clear".split()
)
"""Names of the interface that no function of a program can have."""


@dataclass(frozen=True)
class Field:
    """A member of a function's arguments: the C name of a tensor and how many elements it has, in C."""

    tensor: TensorType
    name: str
    count: str

    @property
    def ctype(self) -> str:
        return NUMBERS[self.tensor.dtype]

    @property
    def shape(self) -> str:
        return f"{self.tensor.dtype} [{', '.join(map(str, self.tensor.shape))}]"


class Interface:
    """The C names of a function: ``symbol``, its sizes, its ``inputs`` and ``outputs``."""

    def __init__(self, plan: FunctionPlan, taken: set[str]):
        self.plan = plan
        self.symbol = identifier(plan.name, taken)
        names: set[str] = set()
        self.dims = {dim: identifier(dim, names) for dim in plan.signature.dims}
        names |= {f"{name}_count" for name in names}
        self.inputs = [self._field(tensor, names) for tensor in plan.signature.inputs]
        self.outputs = [self._field(tensor, names) for tensor in plan.signature.outputs]

    def _field(self, tensor: TensorType, names: set[str]) -> Field:
        name = identifier(tensor.name, names)
        names.add(f"{name}_count")
        factors = [self._size(size) for size in tensor.shape]
        return Field(tensor, name, " * ".join(factors) or "INT64_C(1)")

    def _size(self, size: int | str) -> str:
        """A dimension in C: integers, names, + - * and powers."""
        if isinstance(size, int):
            return f"INT64_C({size})"
        power = re.sub(r"(\w+)\*\*(\d+)", lambda m: "*".join([m[1]] * int(m[2])), size)
        return "(" + re.sub(r"\b[^\W\d]\w*", lambda m: SIZE + m[0], power) + ")"


def interfaces(plans: Iterable[FunctionPlan]) -> list[Interface]:
    taken = set(_TAKEN)
    return [Interface(plan, taken) for plan in plans]


def identifier(name: str, taken: set[str]) -> str:
    """A C identifier like a name, none of those taken, to which it is added."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    plain = f"_{plain}" if plain[0].isdigit() else plain
    plain = f"{plain}_" if plain in _KEYWORDS else plain
    found, number = plain, 2
    while found in taken:
        found, number = f"{plain}_{number}", number + 1
    taken.add(found)
    return found


def header(functions: Iterable[Interface]) -> str:
    """The text of the public header."""
    text = (SOURCES / "tersor.h").read_text(encoding="utf-8")
    return text.replace("@functions@", "".join(map(_declare, functions)))


def _declare(function: Interface) -> str:
    lines = []
    for dim, (low, high) in function.plan.signature.dims.items():
        lines.append(f"  int64_t {function.dims[dim]}; /* {low} to {high} */")
    for field in function.inputs:
        lines += [
            f"  const {field.ctype} *{field.name}; /* {field.shape} */",
            f"  size_t {field.name}_count;",
        ]
    for field in function.outputs:
        lines += [f"  {field.ctype} *{field.name}; /* {field.shape} */", f"  size_t {field.name}_count;"]
    body = "\n".join(lines)
    symbol = function.symbol
    states = function.plan.signature.states
    kept = f" It reads and updates the session's states ({', '.join(states)})." if states else ""
    return f"""
/* The arguments of tersor_{symbol}: sizes, inputs, memory for outputs. Tensors are row-major; each has its number of
 * elements beside it, which for inputs must be that of the shape, and for outputs at least as many. Outputs must not
 * overlap inputs or each other. bfloat16 and float16 are the bits of the numbers, bool is a byte of 0 or 1. */
typedef struct tersor_{symbol}_arguments {{
{body}
}} tersor_{symbol}_arguments;

/* Runs the function {function.plan.name} of the model.{kept} */
TERSOR_API int tersor_{symbol}(tersor_session *session, const tersor_{symbol}_arguments *arguments);
"""


def functions_source(functions: Sequence[Interface], kernels: Sequence[PlainKernel], offsets: dict[str, int],
                     state_offsets: dict[str, int]) -> str:  # fmt: skip
    """The text of functions.c. offsets: where each weight lies in the file; state_offsets: each state in a session."""
    parts = [
        "/* The functions of the model: which kernels run, on what memory. Generated by Tersor. */\n",
        '#include "internal.h"\n\n',
        declarations(kernels),
        "\n",
        launchers(kernels),
        *(_define(function, offsets, state_offsets) for function in functions),
    ]
    return "".join(parts)


def _define(function: Interface, offsets: dict[str, int], state_offsets: dict[str, int]) -> str:
    signature, symbol = function.plan.signature, function.symbol
    fields = [*function.inputs, *function.outputs]
    checks, sizes = [], ""
    for dim, (low, high) in signature.dims.items():
        name = function.dims[dim]
        sizes += f"  const int64_t {SIZE}{dim} = arguments->{name};\n"
        checks.append(f"  if ({SIZE}{dim} < {low} || {SIZE}{dim} > {high}) return TERSOR_WRONG_SIZE;")
    checks += [f"  if (arguments->{f.name} == NULL) return TERSOR_NULL_POINTER;" for f in fields]
    for found, relation in ((function.inputs, "!="), (function.outputs, "<")):
        checks += [
            f"  if (arguments->{f.name}_count {relation} (size_t)({f.count})) return TERSOR_WRONG_COUNT;"
            for f in found
        ]
    calls = "\n".join(_call(function, step, offsets, state_offsets) for step in function.plan.steps)
    uses = "".join(
        f"  char *const {name} = session->{name};\n"
        for name in ("weights", "states", "workspace")
        if re.search(rf"\b{name} \+", calls)
    )
    return f"""
int tersor_{symbol}(tersor_session *session, const tersor_{symbol}_arguments *arguments) {{
  if (session == NULL || arguments == NULL) return TERSOR_NULL_POINTER;
{sizes}{chr(10).join(checks)}
  const int entered = tersor_enter(session);
  if (entered != TERSOR_OK) return entered == TERSOR_BUSY ? entered : tersor_leave(session, entered);
  struct tersor_worker *const worker = &session->worker;
{uses}{calls}
  return tersor_leave(session, TERSOR_OK);
}}
"""


def _call(function: Interface, step: Step, offsets: dict[str, int], state_offsets: dict[str, int]) -> str:
    signature = function.plan.signature
    arguments = ["worker", "worker->scratch"]
    for place in step.places:
        if place.kind == "input":
            arguments.append(f"(void *)(uintptr_t)arguments->{function.inputs[place.index].name}")
        elif place.kind == "output":
            arguments.append(f"arguments->{function.outputs[place.index].name}")
        elif place.kind == "weight":
            arguments.append(f"weights + {offsets[signature.weights[place.index]]}")
        elif place.kind == "state":
            arguments.append(f"states + {state_offsets[signature.states[place.index]]}")
        else:
            arguments.append(f"workspace + {place.index}")
    text = f"  {step.kernel.main.symbol}({', '.join([*arguments, *step.sizes])});"
    if not step.kernel.main.may_fail:
        return text
    failed = "    session->failed = 1;\n" if signature.states else ""
    return f"{text}\n  if (worker->status) {{\n{failed}    return tersor_leave(session, TERSOR_OUTSIDE_STATE);\n  }}"


def layout(values: dict[str, int]) -> str:
    """The text of layout.h: sizes that the static sources need."""
    lines = [f"#define TERSOR_{name} {value}" for name, value in values.items()]
    return "/* Sizes of this model. Generated by Tersor. */\n" + "\n".join(lines) + "\n"
