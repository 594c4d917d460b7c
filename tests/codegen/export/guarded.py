"""Calls an exported model whose every tensor ends where memory that must not be touched begins.

    python guarded.py FOLDER SIZES

SIZES: a JSON object of dimensions. Inputs are ones. The process dies of a signal when a kernel goes too far.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import sys
from pathlib import Path

import numpy as np

LIBC = ctypes.CDLL(None)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: np.ndarray, keep: list[mmap.mmap]) -> int:
    """The address of a copy of the array that ends at a page which cannot be read."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    keep.append(mmap.mmap(-1, size + mmap.PAGESIZE))
    start = ctypes.addressof(ctypes.c_char.from_buffer(keep[-1]))
    if LIBC.mprotect(start + size, mmap.PAGESIZE, 0):
        raise OSError("mprotect failed")
    ctypes.memmove(start + size - array.nbytes, array.ctypes.data, array.nbytes)
    return start + size - array.nbytes


def main(folder: Path, sizes: dict[str, int]) -> int:
    spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, keep = module.load(), []
    function, session = model.functions["main"], model.session()
    inputs = {
        t["name"]: np.ones([sizes.get(dim, dim) for dim in t["shape"]], t["dtype"]) for t in function.inputs
    }
    arguments, outputs, alive = function.bind(inputs)
    for tensor in (*function.inputs, *function.outputs):
        array = {**alive, **outputs}[tensor["name"]]
        setattr(arguments, tensor["field"], guarded(array, keep))
    return model.call("main")(session._handle, ctypes.byref(arguments))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
