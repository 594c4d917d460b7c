"""What calls hand on to later calls: one session is one conversation with a compiled model."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.codegen.runtime import library, weights
from tersor.codegen.runtime.outputs import Outputs
from tersor.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from tersor.codegen.runtime.model import CompiledFunction, CompiledModel

OUTSIDE = "a position lies outside the state"
"""What compiled code says when it is told to write outside a state; it has written nothing there."""


class Session:
    """A compiled model with states of its own, which start as zeros; made by `CompiledModel.session`.

    Call it for `main`, and the others by name: ``session.prefill(...)``, ``session.decode(...)``. Sessions do not
    know of each other. Several Python threads may call one: its calls run one after the other.

    Attributes:
        functions: by name, also those whose names are methods of a session.
        states: the states' memory by name, to look at, to save and to fill, while no call is under way.
    """

    def __init__(self, model: CompiledModel):
        self.model = model
        self.states: Mapping[str, np.ndarray] = MappingProxyType(
            {n: aligned_zeros(t.shape, t.dtype) for n, t in model.manifest.states.items()}
        )
        from_dlpack = library.tvm_ffi().from_dlpack if self.states else None
        self._tensors = {name: from_dlpack(state) for name, state in self.states.items()}
        self._lock = threading.Lock()
        self._failed = ""
        self.functions: Mapping[str, SessionFunction] = {
            name: SessionFunction(self, function) for name, function in model.functions.items()
        }

    def __call__(self, *inputs: Any, **named: Any) -> Outputs:
        """Run `main`. Raises as `SessionFunction.__call__`."""
        return self.functions[self.model.main.name](*inputs, **named)

    def __getattr__(self, name: str) -> SessionFunction:
        if name.startswith("_") or name not in self.functions:
            raise AttributeError(
                f"there is no function {name!r}; the functions are {', '.join(self.__dict__.get('functions', ()))}"
            )
        return self.functions[name]

    def reset(self) -> None:
        """Every state is zeros again, as in a new session."""
        with self._lock:
            for state in self.states.values():
                state.fill(0)
            self._failed = ""

    def __repr__(self) -> str:
        size = sum(state.nbytes for state in self.states.values())
        return f"Session({', '.join(self.functions)}; {len(self.states)} states, {size / 1e6:.1f} MB)"


class SessionFunction:
    """One function of a session."""

    def __init__(self, session: Session, function: CompiledFunction):
        self.session, self.name = session, function.name
        self._function = function
        self._tensors = [session._tensors[name] for name in function.signature.states]

    def __call__(self, *inputs: Any, **named: Any) -> Outputs:
        """Run the function on the session's states.

        Raises InputError: the inputs do not fit the signature (nothing has run then), or a state has no room for
        what was to be written. After that, and when compiled code fails, the states are half those of before and half
        those of behind the call: further calls are refused until `Session.reset`.
        """
        session = self.session
        if not self._tensors:
            return self._function(*inputs, **named)
        with session._lock:
            if session._failed:
                raise InputError(
                    "an earlier call of this session failed half-way",
                    why=session._failed,
                    fix="start again with session.reset(), or take another session()",
                )
            try:
                return self._function.run(inputs, named, self._tensors)
            except ArtifactError as error:
                session._failed = error.why or error.what
                if OUTSIDE not in (error.why or ""):
                    raise
                rooms = ", ".join(
                    str(session.model.manifest.states[n]) for n in self._function.signature.states[:4]
                )
                raise InputError(
                    "a state has no room for what this call writes",
                    where=f"function {self.name!r}",
                    why=f"{OUTSIDE}; its states: {rooms}{' ...' * (len(self._tensors) > 4)}",
                    fix="pass positions inside the state, or capture the model with a larger one; "
                    "then session.reset()",
                ) from error


def aligned_zeros(shape: tuple[int | str, ...], dtype: str) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + weights.ALIGNMENT, np.uint8)
    offset = weights.padding(raw.ctypes.data)
    return raw[offset : offset + size].view(dtype).reshape(shape)
