"""Convolutions over patches as linear layers."""

from __future__ import annotations

import pytest
import torch

from tersor.ir import Dim, Program, Range, Value, verify
from tersor.passes import Pipeline
from tersor.passes.fold.patch_embedding import FoldPatchEmbedding
from tests.passes.check_pass import check_pass

B = Dim.symbol("batch")


def embedding(
    *, folded: bool = False, sequence: bool = True, size: int = 12, kernel: int = 4, bias: bool = True, **conv
) -> Program:
    """Patches of an image [batch, 3, size, size], as a sequence [batch, patches, 8] or as they come."""
    made, generator = Program(), torch.Generator().manual_seed(0)
    function = made.add_function("main", {"batch": Range(1, 4)})
    x = function.add_input("x", Value("float32", (B, 3, size, size)))
    build, count = function.builder(), size // kernel
    weight = torch.randn(8, 3, kernel, kernel, generator=generator)
    given = build.parameter("b", torch.randn(8, generator=generator)) if bias else None
    if folded:
        apart = build.reshape(x, shape=(B, 3, count, kernel, count, kernel))
        patches = build.permute(apart, dims=(0, 2, 4, 1, 3, 5))
        patches = build.reshape(patches, shape=(B, count**2, 3 * kernel**2))
        flat = build.parameter("w", weight.reshape(8, -1))
        y = build.emit("linear", patches, flat, given, site="patches")
        if not sequence:
            y = build.reshape(build.permute(y, dims=(0, 2, 1)), shape=(B, 8, count, count))
    else:
        options = {"stride": (kernel, kernel)} | conv
        y = build.emit("conv2d", x, build.parameter("w", weight), given, site="patches", **options)
        if sequence:
            y = build.permute(build.reshape(y, shape=(B, 8, count**2)), dims=(0, 2, 1))
    function.set_outputs({"y": y})
    verify(made)
    return made


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_a_linear_layer(sequence, bias):
    check_pass(
        FoldPatchEmbedding(),
        embedding(sequence=sequence, bias=bias),
        embedding(sequence=sequence, bias=bias, folded=True),
        unmatched=embedding(stride=(2, 2), sequence=False),
    )


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"stride": (2, 2)}, "overlap"),
        ({"padding": (2, 2)}, "padding"),
        ({"kernel": 1, "stride": (1, 1)}, "single pixels"),
        ({"size": 14}, "do not tile"),
    ],
)
def test_other_convolutions_stay(form, reason):
    _, report = Pipeline([FoldPatchEmbedding()]).run(embedding(sequence=False, **form))
    assert reason in report.steps[0].skips[0].reason
