"""What a case is, and what can come out of it."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tersor.errors import TersorError

GOOD = ("right", "refused", "unchecked")
BAD = ("wrong", "untyped error", "outside read", "crashed", "hung", "memory")
"""Kinds of outcomes; one of the second list is a defect of ours."""

ROOT = f"{Path(__file__).resolve().parents[2]}/"
"""Left out of reports: they are read on other machines."""

Stage = Callable[[str], None]
"""Told what comes next, so that a crash or a hang can be attributed."""


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        kind: one of `GOOD` or `BAD`.
        label: what is counted: the class of a refusal, why nothing was compared, where a defect lies.
        detail: enough to understand it without a replay.
    """

    kind: str
    label: str = ""
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Part(Protocol):
    """One kind of cases. Made once in each worker process."""

    limit: float
    """Seconds of work after which a case hangs."""
    memory: int
    """Bytes that a case may take on top of what the process had."""

    def run(self, rng: random.Random, stage: Stage) -> Outcome:
        """One case, made from these random numbers alone; exceptions of ours come out as they are."""
        ...


def judged(part: Part, rng: random.Random, stage: Stage = lambda name: None) -> Outcome:
    """Runs a case; an exception is a refusal where it is a `TersorError`, and a defect otherwise."""
    try:
        return part.run(rng, stage)
    except TersorError as error:
        return Outcome("refused", type(error).__name__, str(error))
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return Outcome(
                "memory",
                type(error).__name__,
                "".join(traceback.format_exception(error)).replace(ROOT, "")[-4000:],
            )
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename.removeprefix(ROOT)}:{last.lineno}"
        return Outcome(
            "untyped error",
            f"{type(error).__name__} at {place}",
            "".join(traceback.format_exception(error)).replace(ROOT, "")[-4000:],
        )
