"""How far two sets of results are apart."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.passes.numerics import outputs, precision, relative_error, small_inputs
from tests.passes.programs import Transformer


def results(values, dtype=torch.float32):
    return {"main": {"y": torch.tensor(values, dtype=dtype)}}


@pytest.mark.parametrize(
    ("reference", "actual", "error"),
    [
        (results([1.0, -4.0]), results([1.0, -4.0]), 0.0),
        (results([1.0, -4.0]), results([2.0, -4.0]), 0.25),
        (results([math.nan, 1.0]), results([math.nan, 1.0]), 0.0),
        (results([math.nan, 1.0]), results([math.nan, 1.5]), 0.5),
        (results([math.nan, 1.0]), results([1.0, 1.0]), math.inf),
        (results([math.inf, 1.0]), results([math.inf, 1.0]), 0.0),
        (results([math.inf, 1.0]), results([-math.inf, 1.0]), math.inf),
        (results([0.0]), results([0.1]), math.inf),
        (results([1, 2], torch.int64), results([1, 2], torch.int64), 0.0),
        (results([1, 2], torch.int64), results([1, 3], torch.int64), math.inf),
        (results([1.0]), results([1.0, 1.0]), math.inf),
    ],
)
def test_relative_error(reference, actual, error):
    assert relative_error(reference, actual) == error


def test_precision_is_that_of_the_coarsest_type():
    both = {"main": {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.float16), "c": torch.ones(1).long()}}
    assert precision(both) == torch.finfo(torch.float16).eps
    assert precision(results([1], torch.int64)) == 0


def test_small_inputs_keep_different_dimensions_apart():
    made = Transformer(layers=1).build()
    given = small_inputs(made)
    assert given["main"]["x"].shape == (2, 7, 16) and given["main"]["mask"].shape == (2, 1, 1, 7)
    assert outputs(made, given, torch.float64)["main"]["hidden"].dtype == torch.float64
