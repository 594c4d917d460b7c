"""Proof that nothing outside a folder is read: every file that Python opens, and what the kernel says of canaries.

An audit hook (PEP 578) sees what Python code and its standard library open, start and connect to; inotify(7) sees
whoever opens one of the watched files, C++ libraries included.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
)
"""Events that reading a model has no reason for."""
LISTING = ("os.listdir", "os.scandir", "os.chdir")
IN_ACCESS, IN_OPEN, IN_NONBLOCK = 0x1, 0x20, 0o4000

_libc = ctypes.CDLL(None, use_errno=True)
_active: list[Watch] = []


class Watch:
    """Inside, what is opened outside of ``folder`` is collected in ``seen``; what Python imports is not counted."""

    def __init__(self, folder: Path, canaries: tuple[Path, ...] = ()):
        self.folder = folder.resolve()
        self.seen: list[str] = []
        self._canaries = canaries
        self._libraries = tuple(
            str(Path(p).resolve())
            for p in {*sys.path, sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
            if p
        )

    def __enter__(self) -> Watch:
        _install()
        self._inotify = _libc.inotify_init1(IN_NONBLOCK)
        if self._inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        for path in self._canaries:
            if _libc.inotify_add_watch(self._inotify, os.fsencode(path), IN_ACCESS | IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), f"cannot watch {path}")
        _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.remove(self)
        try:
            if os.read(self._inotify, 1 << 16):
                self.seen.append(f"one of {', '.join(map(str, self._canaries))} (inotify)")
        except BlockingIOError:
            pass
        os.close(self._inotify)

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        """What the audit hook passes on."""
        if name in FORBIDDEN:
            self.seen.append(f"{name}{arguments!r}"[:200])
        elif name == "open" or name in LISTING:
            path = arguments[0] if arguments else None
            if isinstance(path, str | bytes | os.PathLike) and not self._allowed(os.fsdecode(path)):
                self.seen.append(f"{name} {os.fsdecode(path)!r}"[:300])

    def _allowed(self, path: str) -> bool:
        real = os.path.realpath(path)
        inside = real == str(self.folder) or real.startswith(f"{self.folder}{os.sep}")
        return inside or any(real == lib or real.startswith(lib + os.sep) for lib in self._libraries)


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    if _active and (name == "open" or name in FORBIDDEN or name in LISTING):
        for watch in _active:
            watch.event(name, arguments)


_installed: list[bool] = []


def _install() -> None:
    """Once in a process: audit hooks cannot be removed."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
