"""Everything that changes a program: one folder per family, one pass per file, and the pipeline that runs them."""

from tersor.passes.base import (
    STAGES,
    Equivalent,
    Exact,
    Finding,
    Lossy,
    Pass,
    PassResult,
)
from tersor.passes.calibration import Calibration, Request
from tersor.passes.context import Context
from tersor.passes.gates import Budget, Evaluate, Fidelity, Measure, Stage
from tersor.passes.pipeline import Pipeline
from tersor.passes.registry import load_plugins, passes, register
from tersor.passes.report import Report
from tersor.passes.sites import site_of

__all__ = [
    "STAGES", "Budget", "Calibration", "Context", "Equivalent", "Evaluate", "Exact", "Fidelity", "Finding", "Lossy",
    "Measure", "Pass", "PassResult", "Pipeline", "Report", "Request", "Stage", "load_plugins", "passes", "register",
    "site_of",
]  # fmt: skip
