"""What ends a command that runs programs elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that closes, end what is inside as Ctrl-C does: devices are left as they were.

    A second one ends the process at once. Signals that are ignored or handled already stay so. Elsewhere than in the
    main thread, where Python takes no handlers, nothing changes.

    Raises:
        SystemExit: such a signal came; the code is a shell's, 128 + its number.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
