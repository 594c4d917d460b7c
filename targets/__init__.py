"""What the hardware is: target descriptions, detection of this machine, checks made before compiling."""

from tersor.targets.registry import (
    check_memory,
    describe,
    missing_on_host,
    names,
    required_features,
    resolve,
)
from tersor.targets.schema import Cluster, Target

__all__ = [
    "Cluster",
    "Target",
    "check_memory",
    "describe",
    "missing_on_host",
    "names",
    "required_features",
    "resolve",
]
