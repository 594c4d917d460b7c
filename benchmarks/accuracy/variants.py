"""Named recipes with one step taken out, so that its effect can be seen beside them."""

from __future__ import annotations

from collections.abc import Callable

from tersor.passes import Pipeline
from tersor.passes.recipes import get

SMOOTHING = "smooth.smoothquant"

VARIANTS: dict[str, Callable[[], Pipeline]] = {
    "int8-unsmoothed": lambda: get("int8").remove(SMOOTHING),
    "int8-dynamic-unsmoothed": lambda: get("int8-dynamic").remove(SMOOTHING),
}


def pipeline(name: str) -> Pipeline:
    """A variant by name, else a named recipe or a TOML file.

    Raises:
        PipelineError: there is no such recipe.
    """
    if name not in VARIANTS:
        return get(name)
    made = VARIANTS[name]()
    made.name = name
    return made


def names(text: str) -> list[str]:
    """A converter of comma-separated recipes for argparse."""
    return text.split(",")
