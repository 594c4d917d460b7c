"""What passes need to know of the values inside a program, measured on the user's data."""

from tersor.passes.calibration.batches import Batch, Calibration, Dataset
from tersor.passes.calibration.blockwise import Step, sequential
from tersor.passes.calibration.requests import Request, Statistics
from tersor.passes.calibration.statistics import (
    Gram,
    Histogram,
    MinMax,
    Moments,
    Samples,
    Statistic,
    no_range,
)
from tersor.passes.calibration.store import Pieces
from tersor.passes.calibration.sweep import calibrate

__all__ = [
    "Batch", "Calibration", "Dataset", "Gram", "Histogram", "MinMax", "Moments", "Pieces", "Request", "Samples",
    "Statistic", "Statistics", "Step", "calibrate", "no_range", "sequential",
]  # fmt: skip
