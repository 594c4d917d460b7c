"""Adds the operation ``tersor_squash.squash`` and the pass ``tersor_squash.activations`` to Tersor."""

from tersor_squash import activations, op

__all__ = ["activations", "op"]
