"""Named dynamic dimensions as callers write them."""

from __future__ import annotations

import pytest
import torch

from tersor import frontends
from tersor.errors import InputError
from tersor.frontends.dynamic import read_dynamic
from tersor.ir import Range

TENSORS = {"ids": torch.arange(32).reshape(2, 16), "mask": torch.ones(2, 16), "image": torch.ones(1, 3, 4, 4)}


def test_names_axes_and_ranges():
    dims = read_dynamic({"ids": {0: ("batch", 1, 8), -1: ("length", 1, 512)}}, TENSORS)
    assert dims.axes == {"ids": {0: "batch", 1: "length"}}
    assert dims.ranges == {"batch": Range(1, 8), "length": Range(1, 512)}


def test_traced_sizes_are_distinct_and_never_one():
    spec = {"ids": {1: ("length", 1, 64)}, "mask": {1: ("other", 1, 64)}, "image": {0: ("batch", 1, 8)}}
    dims = read_dynamic(spec, TENSORS)
    sizes = list(dims.traced.values())
    assert len(set(sizes)) == 3 and all(s > 1 for s in sizes)
    larger = dims.enlarge(TENSORS)
    assert larger["image"].shape[0] == dims.traced["batch"]
    assert larger["ids"].shape == (2, dims.traced["length"])
    assert TENSORS["image"].shape[0] == 1


def test_enlarged_examples_repeat_what_was_given():
    dims = read_dynamic(
        {"ids": {1: ("length", 20, 20), 0: ("batch", 3, 8)}}, TENSORS | {"ids": torch.arange(20)[None]}
    )
    assert dims.enlarge({"ids": torch.arange(20)[None]})["ids"].unique().tolist() == list(range(20))


def test_the_sizes_of_the_example_are_kept_within_their_ranges():
    spec = {"ids": {0: ("batch", 1, 8), 1: ("length", 1, 512)}, "image": {0: ("images", 3, 8)}}
    assert read_dynamic(spec, TENSORS).example == {"batch": 2, "length": 16, "images": 3}


def test_a_range_of_one_size_is_static():
    assert read_dynamic({"ids": {0: ("batch", 2, 2)}}, TENSORS).ranges == {}


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ({"tokens": {0: ("batch", 1, 8)}}, "'tokens'"),
        ({"ids": {2: ("batch", 1, 8)}}, "axis 2"),
        ({"ids": {0: ("batch", 8, 1)}}, "smallest, largest"),
        ({"ids": {0: ("batch", 0, 8)}}, "smallest, largest"),
        ({"ids": {0: "batch"}}, "smallest, largest"),
        ({"ids": {0: ("the batch", 1, 8)}}, "smallest, largest"),
        ({"ids": {0: ("n", 1, 8)}, "mask": {0: ("n", 1, 9)}}, "two ranges"),
        ({"ids": {0: ("n", 1, 20), 1: ("n", 1, 20)}}, "two sizes"),
        ({"ids": {1: ("length", 1, 8)}}, "size 16"),
        ({"image": {0: ("batch", 4, 4)}}, "size 1"),
        ({"ids": {0: ("batch", True, 8)}}, "smallest, largest"),
        ({"ids": {True: ("batch", 1, 8)}}, "axis True"),
        ({"ids": ("batch", 1, 8)}, "by input and axis"),
        ({"ids": None}, "by input and axis"),
        (["ids"], "by input and axis"),
    ],
)
def test_refusals(spec, part):
    with pytest.raises(InputError) as caught:
        read_dynamic(spec, TENSORS)
    assert part in str(caught.value) and caught.value.fix


def test_the_larger_of_two_sizes_is_known_from_the_ranges():
    """As MPT cuts its table of ALiBi biases: max(0, 8 - length) is 8 - length where no length is above 8."""

    class Tail(torch.nn.Module):
        def forward(self, x):
            table = torch.arange(8.0)
            return x + table[max(0, 8 - x.shape[1]) :]

    x = torch.randn(2, 5)
    program = frontends.capture(Tail(), (x,), {"x": {1: ("length", 2, 8)}})
    for length in (2, 5, 8):
        x = torch.randn(2, length)
        torch.testing.assert_close(program(x=x)[program.main.outputs[0]], Tail()(x))
