"""squash(x) = bound * tanh(x / bound): the identity near zero, never beyond ``bound``."""

from __future__ import annotations

import torch

from tersor.ir import Builder, register_op


@torch.library.custom_op("tersor_squash::squash", mutates_args=())
def torch_squash(x: torch.Tensor, *, bound: float = 3.0) -> torch.Tensor:
    """The operator for use in models: ``torch.ops.tersor_squash.squash(x, bound=3.0)``."""
    return bound * torch.tanh(x / bound)


@torch_squash.register_fake
def _(x: torch.Tensor, *, bound: float = 3.0) -> torch.Tensor:
    return torch.empty_like(x)


def squash(x, *, bound: float = 3.0):
    """bound * tanh(x / bound)."""
    return bound * torch.tanh(x / bound)


def decompose(build: Builder, x, *, bound: float = 3.0):
    """The same in operations of the dialect, for code generation."""
    return build.mul(build.tanh(build.mul(x, 1.0 / bound)), bound)


SQUASH = register_op(
    "tersor_squash.squash", squash, decompose=decompose, captures=(torch.ops.tersor_squash.squash.default,)
)
