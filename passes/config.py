"""Checks and converts the fields of dataclasses (passes, budgets) against their annotations.

Annotations understood: ``bool``, ``int``, ``float`` (takes an int), ``str``, ``None``, ``Literal[...]``, unions and
``tuple[...]`` (takes a list, so that values read from JSON or TOML fit).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union

from tersor.errors import PipelineError


class Mismatch(Exception):
    """A value does not fit its annotation; the message says what would."""


def conform(annotation: Any, value: Any) -> Any:
    """``value`` as the annotated type.

    Raises:
        Mismatch: it is not one.
        TypeError: the annotation is none of those that a field may have.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        if value is not None:
            raise Mismatch("None")
        return None
    if annotation in (bool, int, str):
        # a bool is an int to Python, but `bits=True` is a mistake
        if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
            raise Mismatch(_NAMES[annotation])
        return value
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Mismatch(_NAMES[float])
        return float(value)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise Mismatch("one of " + ", ".join(map(repr, arguments)))
        return value
    if origin in (Union, types.UnionType):
        wanted = []
        for choice in arguments:
            try:
                return conform(choice, value)
            except Mismatch as mismatch:
                wanted.append(str(mismatch))
        raise Mismatch(" or ".join(wanted))
    if origin is tuple:
        return _conform_tuple(arguments, value)
    raise TypeError(f"a field cannot be annotated {annotation!r}")


def conform_fields(instance: Any) -> list[str]:
    """Converts every field of a frozen dataclass's instance in place; returns what does not fit, in words.

    Raises:
        PipelineError: an annotation cannot be resolved.
    """
    try:
        annotations = typing.get_type_hints(type(instance))
    except NameError as error:
        raise PipelineError(
            f"an annotation of {type(instance).__name__} cannot be resolved: {error}",
            fix="import the name at the top of the module, not under TYPE_CHECKING or inside a function",
        ) from None
    problems = []
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        try:
            object.__setattr__(instance, field.name, conform(annotations[field.name], value))
        except Mismatch as wanted:
            problems.append(f"{field.name} = {value!r} should be {wanted}")
    return problems


def plain(value: Any) -> Any:
    """A value as JSON or TOML hold it."""
    return [plain(v) for v in value] if isinstance(value, tuple) else value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _conform_tuple(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Mismatch("a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise Mismatch(f"a list of {len(arguments)}")
    try:
        return tuple(conform(a, v) for a, v in zip(arguments, value, strict=True))
    except Mismatch as mismatch:
        raise Mismatch(f"a list of {mismatch}") from None
