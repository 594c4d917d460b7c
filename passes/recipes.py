"""Recipes: pipelines by name, or from a TOML file.

name = "mine"

[[steps]]
pass = "fold.norm_beta"
skip = ["*.lm_head"]

[[steps]]
stage = "prune"
budget = { min_cosine = 0.99 }
on_fail = "revert"
passes = ["mylib.prune", { pass = "fold.zero_heads" }]
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.errors import PipelineError
from tersor.passes.gates import Stage, budget_from
from tersor.passes.pipeline import Pipeline
from tersor.passes.registry import make

CLEANUP = ("cleanup.constant_folding", "cleanup.common_subexpressions", "cleanup.dead_code")
FOLDS = (
    "fold.patch_embedding",
    "fold.norm_beta",
    "fold.key_bias",
    "fold.value_bias",
    "fold.attention_scale",
    "fold.zero_heads",
    "fold.zero_neurons",
)

ROWS = "cleanup.unread_rows"
"""Last, as the passes before it look for layers that read whole values."""

TABLES = "quantize.embeddings"
"""First of what rounds, so that others see what it leaves; without it (`Pipeline.remove`) tables stay wide."""

LARGEST_ERROR = 5e-4
"""Part of the power of a token's outputs that rounding with one scale for all tokens may cost a layer (33 dB)."""

BF16_ATTENTION = {"pass": "quantize.bf16", "kinds": ["attention"]}
"""Attention that is not in 8 bits multiplies bf16."""

ATTENTION = ({"pass": "quantize.attention", "largest_error": 4 * LARGEST_ERROR}, BF16_ATTENTION)
"""More than a layer may lose, as what attention adds is a small part of the stream of tokens that it is added to."""

SMOOTHING = {"pass": "smooth.smoothquant", "largest_error": LARGEST_ERROR}
ACTIVATIONS = ({"pass": "quantize.static", "largest_error": LARGEST_ERROR}, "quantize.dynamic")
"""Scales fixed beforehand, and for inputs whose few huge values forbid that, scales per token."""

RECIPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "none": ("the program as captured", ()),
    "fp32": ("float32, nothing lost: cleanup and exact folds", (*CLEANUP, *FOLDS, ROWS)),
    "bf16": (
        "products of bf16 numbers, sums in float32: half the bytes, no data needed",
        (*CLEANUP, *FOLDS, "quantize.bf16", ROWS),
    ),
    "fp16": (
        "products of fp16 numbers, sums in float32: half the bytes, fast on ARM cores with fp16 arithmetic",
        (*CLEANUP, *FOLDS, "quantize.fp16", ROWS),
    ),
    "int8": (
        "8-bit weights and activations, scales from calibration data (per token where those fail), integer products",
        (
            *CLEANUP,
            *FOLDS,
            SMOOTHING,
            TABLES,
            "quantize.rtn",
            *ACTIVATIONS,
            *ATTENTION,
            "quantize.integers",
            ROWS,
        ),
    ),
    "int8-mixed": (
        "as int8, with bf16 or f32 where a layer would lose too much: the outputs keep 30 dB signal to noise",
        (
            *CLEANUP,
            *FOLDS,
            "smooth.smoothquant",
            {"pass": "quantize.mixed", "min_sqnr_db": 30},
            BF16_ATTENTION,
            "quantize.integers",
            ROWS,
        ),
    ),
    "int8-gptq": (
        "as int8, with weights and biases fitted to each layer's outputs: slower to make",
        (
            *CLEANUP,
            *FOLDS,
            SMOOTHING,
            TABLES,
            "quantize.gptq",
            *ACTIVATIONS,
            *ATTENTION,
            "recover.bias",
            "quantize.integers",
            ROWS,
        ),
    ),
    "int8-dynamic": (
        "8-bit weights and activations, scales found while it runs: needs no data, and is smoothed with some",
        (
            *CLEANUP,
            *FOLDS,
            {"pass": "smooth.smoothquant", "activations": "token", "optional": True},
            TABLES,
            "quantize.rtn",
            "quantize.dynamic",
            BF16_ATTENTION,
            "quantize.integers",
            ROWS,
        ),
    ),
    "quantized": (
        "a model that comes with 8-bit codes as it is: integer products where weights and inputs have them",
        (*CLEANUP, *FOLDS, "quantize.integers", ROWS),
    ),
}
"""Name -> what it is for, and its steps."""


def names() -> list[str]:
    """The named recipes."""
    return list(RECIPES)


def describe(name: str) -> str:
    """What a named recipe is for."""
    return RECIPES[name][0]


def get(recipe: str | Path) -> Pipeline:
    """The pipeline of a named recipe or of a TOML file.

    Raises:
        PipelineError: there is no such recipe or file, or the file is wrong.
    """
    if isinstance(recipe, str) and recipe in RECIPES:
        return Pipeline(RECIPES[recipe][1], name=recipe)
    path = Path(recipe)
    if path.suffix == ".toml":
        return load(path)
    near = difflib.get_close_matches(str(recipe), RECIPES, 1)
    raise PipelineError(
        f"there is no recipe {str(recipe)!r}",
        why=f"recipes: {', '.join(RECIPES)}; or the path of a .toml file",
        fix=f"did you mean {near[0]!r}?" if near else "`tersor recipes` says what each is for",
    )


def load(path: str | Path) -> Pipeline:
    """The pipeline in a TOML file.

    Raises:
        PipelineError: the file cannot be read, or what it says is wrong.
    """
    path = Path(path)
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PipelineError(
            f"recipe {str(path)!r} cannot be read",
            why=str(error),
            fix="give a TOML file, for example: name = 'mine', and for each pass [[steps]], pass = 'fold.norm_beta'",
        ) from None
    try:
        return from_config({"name": path.stem} | config)
    except PipelineError as error:
        raise PipelineError(error.what, where=str(path), why=error.why, fix=error.fix) from None


def from_config(config: Mapping[str, Any]) -> Pipeline:
    """The inverse of `Pipeline.config`.

    Raises:
        PipelineError: an unknown key, pass or option, or a value of the wrong type.
    """
    _known(config, {"name", "steps"}, "a recipe")
    steps = config.get("steps", [])
    if not isinstance(steps, list) or not isinstance(config.get("name", ""), str):
        raise PipelineError("a recipe has a name and a list of steps", fix="write [[steps]] tables")
    return Pipeline([_step(step) for step in steps], name=config.get("name", "custom"))


def _step(config: Any) -> Any:
    if not isinstance(config, Mapping) or "stage" not in config:
        return make(config)
    name = str(config["stage"])
    _known(config, {"stage", "passes", "budget", "on_fail"}, f"stage {name!r}")
    options = {key: config[key] for key in ("on_fail",) if key in config}
    passes = tuple(make(p) for p in config.get("passes", ()))
    return Stage(name, passes, budget_from(config.get("budget", {}), f"stage {name!r}"), **options)


def _known(config: Mapping[str, Any], keys: set[str], what: str) -> None:
    if unknown := sorted(config.keys() - keys):
        raise PipelineError(f"{what} has no {', '.join(unknown)}", fix=f"use {', '.join(sorted(keys))}")
