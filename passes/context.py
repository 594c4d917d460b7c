"""What the manager hands to every pass, and what the front door hands to the manager."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from tersor.errors import InputError
from tersor.passes.facts import Records
from tersor.targets import Target

if TYPE_CHECKING:
    from tersor.ir import Program
    from tersor.passes.calibration import Dataset, Statistics
    from tersor.passes.gates import Evaluate, Measure, Profile


@dataclass
class Context:
    """Surroundings of a run.

    Attributes:
        target: the hardware the program is for; None where it does not matter.
        seed: fixes every random choice.
        records: facts recorded for a program by its digest.
        measure: latency of a program on the target; injected by who can lower programs.
        profile: seconds that each site of a program takes on the target, for the report; None leaves them out.
        evaluate: fidelity of a program to the captured model; injected by who has data.
        numerics: whether to run the program before and after each pass and hold the pass to its declared class:
            "always", "never", or "auto" for programs of moderate size (see `tersor.passes.manager`).
        inputs: inputs for that comparison, by function and input name; made from the signature where absent.
        cache: folder in which results of passes are kept, so that a killed run resumes; None keeps nothing.
        progress: called with the name of each step as it starts.
        calibration: the user's data as it fits the program; None without any. `Pipeline.run` puts it here.
        statistics: the answers to the running pass's ``requests``; None without data.
        reference: for passes that recover (`Pass.recovers`): the program before the lossy passes, whose sites hold
            what they should hold now. The manager gives the last version since which no pass was equivalent only (such
            passes move values between places); one that is given here stands for the program that goes in.
    """

    target: Target | None = None
    seed: int = 0
    records: Records = field(default_factory=Records)
    measure: Measure | None = None
    profile: Profile | None = None
    evaluate: Evaluate | None = None
    numerics: Literal["auto", "always", "never"] = "auto"
    inputs: Mapping[str, Mapping[str, torch.Tensor]] | None = None
    cache: str | Path | None = None
    progress: Callable[[str], None] | None = None
    calibration: Dataset | None = None
    statistics: Statistics | None = None
    reference: Program | None = None

    def __post_init__(self) -> None:
        if self.numerics not in ("auto", "always", "never"):
            raise InputError(f"numerics = {self.numerics!r}", fix="use 'auto', 'always' or 'never'")

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for one purpose (a pass's name): the same ones in every run with this seed."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
