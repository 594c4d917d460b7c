"""What a call returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Outputs(Mapping[str, Any]):
    """The outputs of a model by name, in the model's own order: `out["logits"]`, `out.logits` or `out[0]`.

    A mapping; iterating gives names. Where the model nests its outputs, dots in their names say how: the tensors
    `states.0` and `states.1` are the tuple `out.states`, `cache.key` and `cache.value` the Outputs `out.cache`.
    The full names, such as `out["states.1"]`, are found too.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return tuple(self.values())[key]
        if key in self._tensors:
            return self._tensors[key]
        prefix = f"{key}."
        inner = Outputs({n[len(prefix) :]: t for n, t in self._tensors.items() if n.startswith(prefix)})
        if not inner:
            raise KeyError(key)
        return tuple(inner.values()) if all(name.isdecimal() for name in inner) else inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask before there are tensors
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no output {name!r}; the outputs are {', '.join(self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.partition(".")[0] for name in self._tensors))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        shapes = (f"{name}={tensor.dtype}{list(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Outputs({', '.join(shapes)})"
