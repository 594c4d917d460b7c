"""Every model of the zoo, from torch and from its own ONNX file; `make zoo` compiles all of them besides."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import tersor  # noqa: E402
from tests.zoo import ZOO, report  # noqa: E402
from tests.zoo.check import check, decomposed  # noqa: E402
from tests.zoo.model import ZooModel  # noqa: E402

transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("model", ZOO, ids=lambda m: m.name)
def test_model(model):
    result = check(model, thorough=False)
    assert not result.surprises(), "\n".join(result.surprises())


def test_names_are_unique():
    assert len({m.name for m in ZOO}) == len(ZOO)


def test_the_page_lists_these_models(root):
    page = (root / "docs/zoo.md").read_text(encoding="utf-8")
    rows = report.rows(page)
    assert list(rows) == [m.name for m in ZOO], "write the page again with: python -m tests.zoo --write"
    assert report.page(rows) == page


class _LeftApart(nn.Module):
    """What no rule should fuse: a softmax of a sum of two products, a norm over the rows, a GELU with another tail."""

    def forward(self, x):
        scores = x @ x.mT + (x * 2) @ x.mT.cos()
        x = (scores.softmax(-1) * 0.5) @ x
        x = x * torch.rsqrt((x * x).mean(-2, keepdim=True) + 1e-6)
        return x * (2 + torch.erf(x))


def test_what_is_left_apart_is_counted():
    program = tersor.capture(_LeftApart(), (torch.randn(2, 5, 8),))
    assert decomposed(program.main) == {"attention": 1, "norm": 1, "gelu": 1}


class _Wrong(nn.Module):
    """Adds what depends on whether it is traced."""

    def forward(self, x):
        return x + torch.compiler.is_exporting()


def test_a_wrong_program_is_found():
    model = ZooModel("wrong", "text", _Wrong, lambda: {"x": torch.ones(2, 3)}, ({},))
    surprises = check(model, thorough=False).surprises()
    assert len(surprises) == 2 and all("off by 5.0e-01" in s or "off by 1.0e+00" in s for s in surprises)


def test_a_reason_that_no_longer_applies_is_found():
    exceptions = {"gelu": "it is not recognised"}
    model = ZooModel(
        "plain", "text", lambda: nn.Linear(3, 4), lambda: {"input": torch.ones(2, 3)}, ({},), {}, exceptions
    )
    result = check(model, thorough=False)
    assert result.surprises() == ["no longer true: a GELU stays decomposed (it is not recognised)"]
    assert report.row(result)[3:6] == ["yes", "yes", "-"]
