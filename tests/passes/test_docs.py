"""The code in docs/passes.md runs as it stands."""

from __future__ import annotations

import re

import pytest
import torch

import tersor
from tersor.passes import Pipeline, recipes, registry
from tests.passes.programs import Transformer


@pytest.fixture
def page(root) -> str:
    return (root / "docs" / "passes.md").read_text(encoding="utf-8")


@pytest.fixture
def blocks(page) -> dict[str, list[str]]:
    """Fenced blocks by language."""
    found: dict[str, list[str]] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL):
        found.setdefault(language, []).append(code)
    return found


@pytest.fixture
def scope(blocks):
    """The page's Python, executed; what it registers is forgotten afterwards."""
    known = registry.passes()
    names = {"__name__": "page"}
    for code in blocks["python"]:
        exec(code, names)
    yield names
    registry._passes.clear()
    registry._passes.update(known)


def test_the_pass_on_the_page_is_short_and_works(blocks, scope):
    assert len([line for line in blocks["python"][0].splitlines() if line.strip()]) <= 20
    made = Transformer(layers=2).build()
    after, report = Pipeline(["cleanup.dead_code", scope["TanhGelu"](skip=("block.0.*",))]).run(made)
    assert [n.target.name for n in after.main.calls("gelu", "gelu_tanh")] == ["gelu", "gelu_tanh"]
    assert report.step("mine.tanh_gelu").modified
    assert isinstance(registry.make("mine.tanh_gelu"), tersor.Pass)


def test_the_rule_on_the_page_works(scope):
    from tests.passes.programs import program

    made = program(
        lambda build, x, mask: {"y": build.reciprocal(build.sqrt(build.add(build.mul(x, x), 1.0)))}
    )
    after, report = Pipeline([scope["Rsqrt"]()]).run(made)
    assert after.main.calls("rsqrt") and not after.main.calls("sqrt")
    assert report.steps[0].error < 1e-12


def test_the_calibrated_pass_on_the_page_works(scope):
    made = Transformer(layers=1, mask=None).build()
    _, report = Pipeline([scope["Magnitudes"](only="*.query")]).run(
        made, calibration=[{"x": torch.ones(1, 4, 16)}]
    )
    assert len(report.steps[0].skips) == 1 and report.steps[0].skips[0].reason.startswith("up to ")


def test_the_recipe_on_the_page_loads(blocks, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(blocks["toml"][0])
    assert [step.name for step in recipes.load(path)] == ["fold.norm_beta", "shrink"]


def test_the_facts_on_the_page_are_the_facts_there_are(page):
    from tersor.passes import facts

    listed = re.findall(
        r"^\| `(\w+)` \|", page.partition("| fact | means |")[2].partition("\n\n")[0], flags=re.MULTILINE
    )
    assert listed == facts.names()
