"""Makes the helpers beside the tests importable: pytest's importlib mode leaves this folder off the path."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["x86-64-v3", "x86-64-v4"])
def target(request):
    """Each instruction set that kernels are generated for and this machine can run."""
    return _runnable(request.param)


@pytest.fixture(params=["x86-64-v3", "x86-64-v3+avxvnni", "x86-64-v4", "x86-64-v4+avx512vnni", "native"])
def integer_target(request):
    """Each instruction set on which bytes are multiplied in a way of its own."""
    return _runnable(request.param)


@pytest.fixture(params=["x86-64-v3", "x86-64-v4", "x86-64-v4+avx512bf16"])
def bf16_target(request):
    """Each instruction set on which bf16 numbers are multiplied in a way of its own."""
    return _runnable(request.param)


def _runnable(description):
    """The target of this name, plus an LLVM feature after the sign; skips where this machine cannot run it."""
    from tersor.targets import missing_on_host, resolve
    from tersor.targets.x86 import LEVELS, feature_names

    name, _, extension = description.partition("+")
    resolved = resolve(name)
    if extension:
        features = feature_names(LEVELS[name] | {extension})
        resolved = replace(resolved, mattr=(*resolved.mattr, f"+{extension}"), features=features)
    if missing_on_host(resolved):
        pytest.skip(f"this machine cannot run {description}")
    return resolved
