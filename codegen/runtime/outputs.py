"""What a call returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Outputs(Mapping[str, Any]):
    """The outputs of a model by name, in the model's own order: `out["logits"]`, `out.logits` or `out[0]`.

    A mapping (iterating gives names). Values are arrays, or tuples and dicts of arrays where the model nests
    them.
    """

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, Any]):
        self._values = values

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._values[key]
        return tuple(self._values.values())[key]

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__slots__ or name not in self._values:
            raise AttributeError(f"there is no output {name!r}; the outputs are {', '.join(self.__dir__())}")
        return self._values[name]

    def __dir__(self) -> list[str]:
        return list(self._values) if hasattr(self, "_values") else []

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, tuple):
                return f"({', '.join(map(show, value))})"
            if isinstance(value, dict):
                return f"{{{', '.join(f'{k}: {show(v)}' for k, v in value.items())}}}"
            shape = getattr(value, "shape", None)
            return repr(value) if shape is None else f"{value.dtype}{list(shape)}"

        return f"Outputs({', '.join(f'{name}={show(value)}' for name, value in self._values.items())})"
