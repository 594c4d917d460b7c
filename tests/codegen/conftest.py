"""Makes the helpers beside the tests importable: pytest's importlib mode leaves this folder off the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["x86-64-v3", "x86-64-v4"])
def target(request):
    """Each instruction set that kernels are generated for and this machine can run."""
    from tersor.targets import missing_on_host, resolve

    resolved = resolve(request.param)
    if missing_on_host(resolved):
        pytest.skip(f"this machine cannot run {request.param}")
    return resolved
