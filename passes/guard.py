"""Keeps a pass from writing into parameters, which it shares with the program of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.errors import PipelineError
from tersor.ir import ParameterStore


class NoParameterWrites(TorchDispatchMode):
    """While active, a torch operation that would write into one of the parameters raises before it does."""

    def __init__(self, parameters: ParameterStore):
        super().__init__()
        self._names = {_storage(p.tensor): name for name, p in parameters.items() if p.tensor.numel()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import torch._dynamo, two seconds, to keep it from tracing what nobody traces
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func._schema.is_mutable:
            for argument, value in [
                *zip(func._schema.arguments, args, strict=False),
                *self._named(func, kwargs),
            ]:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._refuse(func, value)
        return func(*args, **kwargs)

    @staticmethod
    def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]

    def _refuse(self, func: Any, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor) and (name := self._names.get(_storage(tensor))):
                raise PipelineError(
                    f"{func} would write into the parameter {name!r}",
                    why="parameters are immutable and shared between versions of a program",
                    fix="compute a new tensor and store it under a new name (builder.parameter)",
                )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
