"""What README and docs say is so: their Python runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tersor.cli import COMMANDS, parser
from tests.pages import ROOT, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import BertConfig, BertModel

    from tersor.passes import registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_passes", dict(registry.passes()))  # the README's pass does not stay
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertModel(config).eval()
    ids = torch.randint(0, 50, (2, 6))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {"model": model, "example_inputs": given, "batches": [given] * 4}
    with torch.no_grad():
        expected = model(**names["example_inputs"]).last_hidden_state
    code = blocks(ROOT / "README.md", "python")
    assert len(code) == 4
    for number, block in enumerate(code):
        exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
        result = names["compiled"](**names["example_inputs"]).last_hidden_state
        torch.testing.assert_close(result, expected, atol=(1e-4, 1e-4, 5e-2, 1e-2)[number], rtol=0)
    counts = [len(p.main.calls("gelu_tanh")) for p in (names["program"], names["small"])]
    assert counts == [0, 1], "skip= leaves one of the two layers alone"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and page.name not in index] == [
        "index.md"
    ]


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    names = {command.__name__.rpartition(".")[2] for command in COMMANDS}
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `tersor (\w+)", page, re.MULTILINE)) == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_options_are_accepted(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4}(?:\.venv/bin/)?tersor (\w+ .*)$", text, re.MULTILINE):
        parser().parse_args(line.partition("#")[0].split())


def test_the_example_target_is_valid() -> None:
    from tersor.targets import Target

    (example,) = blocks(ROOT / "docs/targets.md", "toml")
    target = Target.from_dict(tomllib.loads(example))
    assert target.vector_bits == 512 and target.memory == 2 << 30
