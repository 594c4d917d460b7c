"""The package onnx, which is an extra of ours."""

from __future__ import annotations

from typing import Any

from tersor.errors import InputError


def import_onnx(purpose: str) -> Any:
    """The module onnx.

    Raises:
        InputError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(f"{purpose} needs the package onnx", fix='pip install "tersor[onnx]"') from None
    return onnx
