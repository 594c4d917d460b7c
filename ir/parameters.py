"""Parameters: immutable tensors, hashed once, shared between versions of a program."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from tersor.ir.value import Value


class Parameter:
    """An immutable tensor with its content hash; the tensor must not be written to after it is wrapped."""

    __slots__ = ("tensor", "value", "_digest")

    def __init__(self, tensor: torch.Tensor):
        tensor = tensor.detach().contiguous()
        # dimensions of size 1 may have any stride; who reads the bytes expects the usual ones
        self.tensor = tensor.as_strided(tensor.shape, torch.empty(tensor.shape, device="meta").stride())
        self.value = Value.of(self.tensor)
        self._digest: str | None = None

    @property
    def storage(self) -> tuple[Any, ...]:
        """Equal for parameters that are the same memory read the same way (tied weights)."""
        pointer = self.tensor.data_ptr()
        return (
            pointer or id(self.tensor),
            *self.value.shape,
            self.value.dtype,
        )  # no pointer: empty or on no device

    @property
    def digest(self) -> str:
        """sha256 of dtype, shape and bytes."""
        if self._digest is None:
            sha = hashlib.sha256(str(self.value).encode())
            flat = self.tensor.reshape(-1)
            sha.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
            self._digest = sha.hexdigest()
        return self._digest


class ParameterStore(MutableMapping[str, Parameter]):
    """Parameters by name, in order. Copies share the parameters; setting a name replaces, never writes."""

    def __init__(self, parameters: dict[str, Parameter] | None = None):
        self._parameters = dict(parameters or {})

    def add(self, name: str, tensor: torch.Tensor | Parameter) -> str:
        """Stores a tensor under ``name``, or ``name_1``, ``name_2``, ... where that is taken; returns the
        name.
        """
        unique, count = name, 0
        while unique in self._parameters:
            count += 1
            unique = f"{name}_{count}"
        self[unique] = tensor
        return unique

    def copy(self) -> ParameterStore:
        return ParameterStore(self._parameters)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters; tied ones count once."""
        return sum(p.tensor.nbytes for p in {p.storage: p for p in self.values()}.values())

    def tied(self) -> dict[str, str]:
        """For each name whose memory an earlier name has too: that earlier name."""
        first: dict[tuple[Any, ...], str] = {}
        owners = {name: first.setdefault(p.storage, name) for name, p in self.items()}
        return {name: owner for name, owner in owners.items() if name != owner}

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __setitem__(self, name: str, parameter: Parameter | torch.Tensor) -> None:
        if isinstance(parameter, torch.Tensor):
            parameter = Parameter(parameter)
        self._parameters[name] = parameter

    def __delitem__(self, name: str) -> None:
        del self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
