"""TVM's runtime half: tvm_ffi and libtvm_runtime.so, without the compiler and without torch."""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tersor.errors import ArtifactError

_lock = threading.Lock()


def tvm_version() -> str:
    """Version of the installed TVM, read from its package metadata (tvm itself is not imported)."""
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the package apache-tvm is not installed") from error


def tvm_ffi() -> ModuleType:
    """The module tvm_ffi with the runtime library loaded; ArtifactError when either is missing."""
    with _lock:
        _runtime_library()
        return _import_tvm_ffi()


@cache
def _runtime_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("tvm")
    places = [
        Path(place) / "lib" / "libtvm_runtime.so"
        for place in (spec and spec.submodule_search_locations) or ()
    ]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise _missing(f"{places[0]} does not exist" if places else "the package apache-tvm is not installed")
    # Workers must stay on the CPUs that the process may use. TVM would pin worker i to the machine's CPU i,
    # and change the affinity of the calling thread as well; unbound workers inherit the mask of their caller.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # How often an idle worker looks for work before it sleeps. TVM's 300,000 keep a core busy for a tenth of a
    # second after every call; 10,000 outlast the pauses between the kernels of one call.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "10000")
    _import_tvm_ffi()
    try:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise _missing(f"{path} cannot be loaded: {error}") from error


def set_max_concurrency(threads: int) -> None:
    """Set on how many threads the calling thread launches parallel kernels; creates no worker.

    TVM offers this to C++ only, hence the mangled name (Itanium ABI, `tvm/src/runtime/threading_backend.cc`).
    """
    _runtime_library()["_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"](ctypes.c_int(threads))


class _TorchHidden(importlib.abc.MetaPathFinder):
    """Makes `import torch` fail in one thread: tvm_ffi imports torch where it is installed, for a second."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("torch is not needed to run an artifact", name=name)


def _import_tvm_ffi() -> ModuleType:
    finder = _TorchHidden()
    sys.meta_path.insert(0, finder)
    try:
        import tvm_ffi
    except (ImportError, OSError) as error:
        raise _missing(f"the package apache-tvm-ffi cannot be imported: {error}") from error
    finally:
        sys.meta_path.remove(finder)
    return tvm_ffi


def _missing(why: str) -> ArtifactError:
    return ArtifactError(
        "TVM's runtime is missing, so artifacts cannot be run",
        why=why,
        fix="install Tersor with its requirements (pip install tersor), which pin both packages",
    )
