"""How many threads a call uses.

TVM keeps one pool of workers per calling thread, of a size fixed when it is made. Workers inherit the
affinity of the thread that makes them (see `library`). A calling thread that wants more workers than its pool
has, or whose pool was lost in a fork, hands its calls to a helper thread with a pool of its own.

Known limit: a child forked from a thread that has a pool must leave by `os._exit`, as those of multiprocessing
do; TVM aborts when it tries to join the workers that stayed in the parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from tersor.codegen.runtime import library
from tersor.errors import InputError
from tersor.targets import resolve

VARIABLE = "TERSOR_NUM_THREADS"


def available() -> int:
    """CPUs in the affinity mask of this process: the most threads a call may use."""
    return len(os.sched_getaffinity(0))


def check(threads: Any, source: str) -> int:
    """The user's number of threads; InputError, naming `source`, unless 1 <= threads <= `available()`."""
    try:
        number = int(threads)
        valid = not isinstance(threads, bool | float) and 1 <= number <= available()
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{source}={threads!r} is not a usable number of threads",
            why=f"this process may use {available()} CPUs",
            fix=f"give a whole number from 1 to {available()}, or none for one thread per physical core",
        )
    return number


def default(artifact: int | None) -> int:
    """TERSOR_NUM_THREADS, else the artifact's own number, else the physical cores this process may use."""
    if text := os.environ.get(VARIABLE):
        return check(text, VARIABLE)
    if artifact is not None:
        return min(artifact, available())
    return min(resolve("native").cores or 1, available())


class _Caller(threading.local):
    """What is known about TVM's pool of the calling thread."""

    process = 0
    """Process id the pool was made in; 0 when there is none."""
    workers = 1
    """Threads the pool can use, the calling one included."""
    concurrency: int | None = None
    """What was last asked for."""
    helper: ThreadPoolExecutor | None = None
    helper_workers = 0
    helper_process = 0


_caller = _Caller()


def run(threads: int, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)` with its parallel kernels on `threads` threads."""
    if _caller.concurrency != threads or _caller.process not in (0, os.getpid()):
        if not _configure(threads):
            return _helper(threads).submit(run, threads, call, *arguments).result()
    return call(*arguments)


def _configure(threads: int) -> bool:
    """Make the calling thread's pool use `threads` threads; False when it cannot."""
    if threads == 1:
        library.set_max_concurrency(1)
    elif _caller.process == 0:
        workers = _workers(threads)
        _caller.process, _caller.workers = os.getpid(), workers
        if workers < threads:  # somebody else made this thread's pool before us
            return False
    elif _caller.process != os.getpid() or _caller.workers < threads:
        return False
    else:
        _workers(threads)
    _caller.concurrency = threads
    return True


def _workers(threads: int) -> int:
    """Configure the calling thread's pool (made if there is none); the number of threads it then uses.

    Mode -3 lets the workers share the listed CPUs; the list only sets their number, for nothing is bound.
    """
    configure, count = _functions()
    configure(-3, threads, [str(cpu) for cpu in range(threads)])
    return count()


@cache
def _functions() -> tuple[Callable[..., Any], Callable[[], int]]:
    ffi = library.tvm_ffi()
    return ffi.get_global_func("runtime.config_threadpool"), ffi.get_global_func("runtime.NumThreads")


def _helper(threads: int) -> ThreadPoolExecutor:
    if _caller.helper is None or _caller.helper_workers < threads or _caller.helper_process != os.getpid():
        if _caller.helper is not None and _caller.helper_process == os.getpid():
            _caller.helper.shutdown()
        _caller.helper = ThreadPoolExecutor(1, thread_name_prefix="tersor")
        _caller.helper_workers, _caller.helper_process = threads, os.getpid()
    return _caller.helper
