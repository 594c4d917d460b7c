"""Object files with kernels as plain C functions, for any target that LLVM knows."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tvm
from tvm import tirx

from tersor.codegen import pipeline
from tersor.codegen.export.functions import PlainKernel
from tersor.codegen.llvm import llvm_target
from tersor.errors import CompileError
from tersor.targets import Target

_DEBUG_INFORMATION = re.compile(r"^\s+#dbg_.*\n|^!llvm\.dbg\.cu = .*\n|,? !dbg !\d+", re.MULTILINE)
"""In LLVM's assembly, what describes TIR's variables to debuggers: TVM always makes it, and it would be two thirds of
an object file."""


def object_code(kernels: Iterable[PlainKernel], target: Target) -> bytes:
    """An object file (ELF, Mach-O or COFF, as the target's system has it) with all functions of the kernels.

    Its undefined symbols are those of libm and libc, and the kernels' launch functions.

    Raises:
        CompileError: TVM refused a kernel.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
            file = Path(folder, "kernels.o")
            kernel_module(kernels, target).write_to_file(str(file), "o")
            return file.read_bytes()
    except Exception as error:  # TVM raises builtin exceptions of every kind
        raise CompileError(
            "TVM could not compile the kernels to an object file",
            why=str(error).strip().splitlines()[-1],
            fix="report it with the program (tersor inspect)",
        ) from error


def kernel_module(kernels: Iterable[PlainKernel], target: Target) -> tvm.runtime.Module:
    """The code of the object file as a module of LLVM's; ``inspect_source("asm")`` is its assembly."""
    functions = {f.symbol: f.code for kernel in kernels for f in kernel.functions}
    module = tirx.build(tvm.IRModule(functions), llvm_target(target), pipeline=pipeline.PLAIN)
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        text = Path(folder, "kernels.ll")
        text.write_text(_own(module.inspect_source("ll")), encoding="utf-8")
        return tvm.runtime.load_module(str(text))


def _own(assembly: str) -> str:
    """LLVM's assembly of functions that no debugger is told of, and that a shared library keeps to itself."""
    return _DEBUG_INFORMATION.sub("", assembly).replace("\ndefine dllexport ", "\ndefine hidden ")
