"""Brings a captured program to its canonical form."""

from __future__ import annotations

from tersor.ir.program import Program


def canonicalize(program: Program) -> list[str]:
    return []
