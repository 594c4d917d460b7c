"""Passes by name: Tersor's own, and those that installed packages bring.

A package brings passes (and operations) by the entry-point group ``tersor.passes``; loading an entry point imports
its module, which registers them::

    [project.entry-points."tersor.passes"]
    mylib = "mylib.passes"
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

from tersor.errors import PipelineError
from tersor.passes.base import Pass

GROUP = "tersor.passes"
PassType = TypeVar("PassType", bound=type[Pass])

_passes: dict[str, type[Pass]] = {}
_broken: dict[str, str] = {}


def register(name: str) -> Callable[[PassType], PassType]:
    """Makes a pass known as ``family.pass``; third parties use their package's name as the family.

    Raises:
        PipelineError: the name is taken or malformed, or the class is no pass.
    """

    def add(cls: PassType) -> PassType:
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise PipelineError(f"{cls!r} is registered as pass {name!r} but is no subclass of Pass")
        if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", name):
            raise PipelineError(
                f"{name!r} is no name for a pass",
                fix="write family.pass in lower case, such as 'fold.norm_beta'",
            )
        taken = _passes.get(name)
        # a notebook cell or a reloaded module defines the same class again
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PipelineError(
                f"pass {name!r} is registered twice",
                why=f"by {taken.__module__}.{taken.__qualname__} and by {cls.__module__}.{cls.__qualname__}",
                fix="rename one of them",
            )
        cls.name = name
        _passes[name] = cls
        return cls

    return add


def get(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        PipelineError: there is none; the message has the nearest names and the plugins that failed to load.
    """
    known = passes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        near += [k for k in known if k.endswith(f".{name}") and k not in near]
        fix = f"did you mean {' or '.join(map(repr, near))}?" if near else "`tersor passes` lists all passes"
        raise PipelineError(
            f"there is no pass {name!r}",
            why="these plugins failed to load: " + "; ".join(map(": ".join, _broken.items()))
            if _broken
            else None,
            fix=fix,
        )
    return known[name]


def passes() -> dict[str, type[Pass]]:
    """All registered passes by name, sorted; imports Tersor's own and every plugin."""
    _load_own()
    load_plugins()
    return dict(sorted(_passes.items()))


def make(entry: Pass | type[Pass] | str | Mapping[str, Any]) -> Pass:
    """A pass from itself, its class, its name, or ``{"pass": name, option: value, ...}``.

    Raises:
        PipelineError: it is none of these, or the name or an option is wrong.
    """
    if isinstance(entry, Pass):
        return entry
    if isinstance(entry, type) and issubclass(entry, Pass):
        return entry()
    if isinstance(entry, str):
        return get(entry)()
    if isinstance(entry, Mapping) and isinstance(entry.get("pass"), str):
        return get(entry["pass"]).from_config({k: v for k, v in entry.items() if k != "pass"})
    raise PipelineError(
        f"{entry!r} is no pass", fix="give a pass, its registered name, or {'pass': name, option: value, ...}"
    )


@functools.cache
def _load_own() -> None:
    """Imports every family (a folder beside this file): a new pass is found by being there."""
    import tersor.passes as room

    for family in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        if family.ispkg:
            package = importlib.import_module(family.name)
            for module in pkgutil.iter_modules(package.__path__, f"{family.name}."):
                importlib.import_module(module.name)


@functools.cache
def load_plugins() -> dict[str, str]:
    """Imports what installed packages bring; call it before capturing, so that their operations are known.

    Returns:
        What failed to load, with the reason; each is also warned about. A broken plugin breaks nothing else.
    """
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: p.name):
        package = point.dist.name if point.dist else point.value
        try:
            point.load()
        except Exception as error:  # whatever a foreign module does at import
            _broken[package] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the Tersor plugin {point.name!r} of package {package!r} cannot be loaded "
                f"({_broken[package]}); its passes are missing until it is repaired or uninstalled",
                stacklevel=2,
            )
    return _broken
