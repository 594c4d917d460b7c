"""Compiled models as plain C: kernels in object files, everything between them as C source."""

from __future__ import annotations

from pathlib import Path

SOURCES = Path(__file__).parent / "c"
"""The C sources that come with every export."""
