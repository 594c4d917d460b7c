"""Runs one kernel as the C export has it: an object file, linked to a C program that reads and writes files."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from tersor.codegen.export import SOURCES
from tersor.codegen.export.functions import PlainKernel, plain_kernel
from tersor.codegen.export.launchers import declarations, launchers
from tersor.codegen.export.objects import object_code
from tersor.codegen.export.toolchain import toolchain
from tersor.codegen.kernels.base import Kernel
from tersor.ir.dims import Dim, evaluate_shape
from tersor.targets import Target
from tests.codegen.emulator import run

THREADS = 2

_MAIN = """\
#include <stdio.h>
#include <stdlib.h>
#include "threads.h"
%(code)s
static void *take(size_t size) { return (void *)(((uintptr_t)malloc(size + 64) + 63) / 64 * 64); }
static void read_all(FILE *file, void *to, size_t size) { if (size && fread(to, size, 1, file) != 1) exit(2); }

int main(int argc, char **argv) {
  int64_t head[3 + %(buffers)d + %(sizes)d];
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  if (argc != 3 || !in || !out) return 2;
  read_all(in, head, sizeof head);
  const int64_t *bytes = head + 3, *n = bytes + %(buffers)d;
  void *p[%(buffers)d];
  for (int i = 0; i < %(buffers)d; i++) {
    p[i] = (char *)take((size_t)bytes[i] + 64) + head[1];
    read_all(in, p[i], (size_t)bytes[i]);
  }
  char *scratch = take((size_t)head[0] * %(threads)d);
  struct tersor_pool *pool = take(tersor_pool_bytes(%(threads)d));
  if (tersor_pool_start(pool, %(threads)d, NULL, scratch, (size_t)head[0])) return 3;
  struct tersor_worker worker = {0, scratch, pool};
  kernel(%(arguments)s);
  tersor_pool_stop(pool);
  for (int64_t i = %(buffers)d - head[2]; i < %(buffers)d; i++) fwrite(p[i], (size_t)bytes[i], 1, out);
  fclose(out);
  return worker.status;
}
"""


def _folder() -> Path:
    """A new one, which lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="tersor-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def threads(target: Target) -> Path:
    """The object file of what all programs for a target share."""
    made = _folder() / "threads.o"
    toolchain(target, static=True).compile(SOURCES / "threads.c", made)
    return made


@cache
def program(kernel: Kernel, target: Target) -> tuple[Path, PlainKernel]:
    """The program for a kernel; on Linux for another CPU it is linked statically, so that qemu needs nothing else."""
    folder = _folder()
    plain = plain_kernel("kernel", kernel.build(target))
    (folder / "kernel.o").write_bytes(object_code([plain], target))
    buffers = sum(p.is_buffer for p in plain.main.parameters)
    sizes = len(plain.main.parameters) - buffers
    arguments = ["&worker", "worker.scratch", *(f"p[{i}]" for i in range(buffers))]
    arguments += [f"n[{i}]" for i in range(sizes)]
    values = {
        "code": declarations([plain]) + launchers([plain]),
        "buffers": buffers,
        "sizes": sizes,
        "threads": THREADS,
        "arguments": ", ".join(arguments),
    }
    (folder / "main.c").write_text(_MAIN % values)
    inputs = [folder / "main.c", folder / "kernel.o", threads(target)]
    options = [f"-I{SOURCES}"]
    toolchain(target, static=True).link(inputs, folder / "kernel", static=True, options=options)
    return folder / "kernel", plain


def run_plain(
    kernel: Kernel,
    arrays: Sequence[np.ndarray],
    target: Target,
    output_shapes: Sequence[tuple[int, ...]] | None = None,
    *,
    cpu: str = "max",
    offset: int = 0,
) -> list[np.ndarray]:
    """The kernel's outputs, computed by two threads. As `run_kernel`, for any target that qemu knows.

    cpu: what qemu emulates. offset: bytes by which buffers miss a multiple of 64.
    """
    path, plain = program(kernel, target)
    symbols: dict[str, int] = {}
    for spec, array in zip(kernel.inputs(), arrays, strict=True):
        for dim, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(dim, Dim):
                symbols.setdefault(str(dim), size)
    shapes = output_shapes or [evaluate_shape(spec.shape, symbols) for spec in kernel.outputs()]
    outputs = [
        np.full(
            shape, np.nan if "float" in spec.dtype and spec.dtype != "bfloat16" else 77, stored(spec.dtype)
        )
        for shape, spec in zip(shapes, kernel.outputs(), strict=True)
    ]
    buffers = [np.ascontiguousarray(a) for a in arrays] + outputs
    scalars = [buffers[i].shape[axis] for i, axis in plain.sizes]
    scratch = plain.scratch([(n, n) for n in scalars])
    head = [scratch, offset, len(outputs), *(b.nbytes for b in buffers), *scalars]
    with tempfile.TemporaryDirectory(prefix="tersor-test-") as folder:
        given, found = Path(folder, "in"), Path(folder, "out")
        given.write_bytes(np.array(head, np.int64).tobytes() + b"".join(b.tobytes() for b in buffers))
        run(path, target, str(given), str(found), cpu=cpu)
        data = found.read_bytes()
    results = []
    for output in outputs:
        results.append(np.frombuffer(data[: output.nbytes], output.dtype).reshape(output.shape))
        data = data[output.nbytes :]
    return results


def stored(dtype: str) -> str:
    """numpy's dtype for the same bytes."""
    return "uint16" if dtype == "bfloat16" else dtype
