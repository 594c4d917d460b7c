"""The C source beside an object file of kernels: their declarations, and what hands their loops to threads."""

from __future__ import annotations

from collections.abc import Iterable

from tersor.codegen.export.functions import Parameter, PlainFunction, PlainKernel, launch_symbol

NUMBERS = {
    "int64": "int64_t", "int32": "int32_t", "int16": "int16_t", "int8": "int8_t",
    "uint64": "uint64_t", "uint32": "uint32_t", "uint16": "uint16_t", "uint8": "uint8_t",
    "float32": "float", "float64": "double", "bool": "uint8_t", "bfloat16": "uint16_t", "float16": "uint16_t",
}  # fmt: skip
"""C types of tensors' elements; floats of 16 bits as the bits they are."""


def declarations(kernels: Iterable[PlainKernel]) -> str:
    """Prototypes of the kernels."""
    return "".join(
        f"int32_t {k.main.symbol}({', '.join(['void *worker', 'void *scratch', *_typed(k.main)])});\n"
        for k in kernels
    )


def launchers(kernels: Iterable[PlainKernel]) -> str:
    """The functions that kernels call where they have a loop for several threads; needs threads.h."""
    return "\n".join(_launcher(part) for kernel in kernels for part in kernel.parts)


def _launcher(part: PlainFunction) -> str:
    symbol, names = part.symbol, _names(part.parameters)
    fields = "".join(f"  {_type(p)}{name};\n" for p, name in zip(part.parameters, names, strict=True))
    lead = ["int64_t begin", "int64_t end", "void *scratch"]
    return f"""\
struct {symbol}_arguments {{
{fields}}};

int32_t {symbol}({", ".join([*lead, *_typed(part)])});

static void {symbol}_run(const void *closure, void *scratch, int64_t begin, int64_t end) {{
  const struct {symbol}_arguments *a = closure;
  {symbol}({", ".join(["begin", "end", "scratch", *(f"a->{name}" for name in names)])});
}}

int32_t {launch_symbol(symbol)}({", ".join(["struct tersor_worker *worker", "int64_t count", *_typed(part)])});

int32_t {launch_symbol(symbol)}({", ".join(["struct tersor_worker *worker", "int64_t count", *_typed(part)])}) {{
  const struct {symbol}_arguments arguments = {{{", ".join(names)}}};
  tersor_parallel(worker, {symbol}_run, &arguments, count);
  return 0;
}}
"""


def _typed(function: PlainFunction) -> list[str]:
    names = _names(function.parameters)
    return [f"{_type(p)}{name}" for p, name in zip(function.parameters, names, strict=True)]


def _type(parameter: Parameter) -> str:
    return "void *" if parameter.is_buffer else f"{NUMBERS[parameter.dtype]} "


def _names(parameters: Iterable[Parameter]) -> list[str]:
    """Names in C: TIR does not mind if variables have none, or the same."""
    return [f"{'p' if p.is_buffer else 'n'}{i}" for i, p in enumerate(parameters)]
