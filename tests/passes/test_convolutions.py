"""Convolutions between codes as integer products, exactly."""

from __future__ import annotations

import pytest
import torch

from tersor.ir import Dim, Program, Range, Value, run, verify
from tersor.passes import Pipeline

B, T = Dim.symbol("batch"), Dim.symbol("length")
SIZES = {1: (13,), 2: (11, 9)}
OUTPUTS = CHANNELS = 4


def convolution(
    kernel: tuple[int, ...], *, sizes: tuple[int | Dim, ...] | None = None, code: str = "uint8", zero: float = 117.0,
    computed: bool = False, weight_zero: bool = False, bias: bool = True, groups: int = 1, **form: object,
) -> Program:  # fmt: skip
    """A convolution of codes that stand for whole numbers, so that float32 is exact; with ``computed`` the zero point
    of its input is found while it runs."""
    made, generator = Program(), torch.Generator().manual_seed(0)
    shape = (B, CHANNELS, *(sizes or SIZES[len(kernel)]))
    lengths = {"length": Range(1, 16)} if isinstance(shape[2], Dim) else {}
    function = made.add_function("main", {"batch": Range(1, 4)} | lengths)
    x = function.add_input("x", Value("float32", shape))
    if lengths:
        function.add_input("places", Value("int64", (T,)))  # says what the length is
    build = function.builder()
    one = build.parameter("one", torch.ones(()))
    point = zero - (128 if code == "int8" else 0)
    if computed:
        point = build.add(build.mul(build.amax(x, dims=tuple(range(len(kernel) + 2))), 0.0), point)
    codes = torch.randint(-128, 128, (OUTPUTS, CHANNELS // groups, *kernel), generator=generator)
    scales = torch.arange(1.0, OUTPUTS + 1)
    points = [build.parameter("z", torch.tensor([3.0, -4, 0, 9]))] if weight_zero else []
    weight = build.dequantize(
        build.parameter("w.codes", codes.to(torch.int8)), build.parameter("w.scale", scales), *points, axis=0
    )
    given = build.parameter("b", scales * torch.tensor([7.0, -900, 0, 31])) if bias else None
    coded = build.dequantize(build.quantize(x, one, point, dtype=code), one, point)
    if groups > 1:
        form["groups"] = groups
    y = build.emit(f"conv{len(kernel)}d", coded, weight, given, site="conv", **form)
    function.set_outputs({"y": y})
    verify(made)
    return made


def image(made: Program, *sizes: int) -> dict[str, torch.Tensor]:
    shape = [s if isinstance(s, int) else None for s in made.main.inputs["x"].shape[2:]]
    shape = [s or n for s, n in zip(shape, sizes or shape, strict=True)]
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randint(-140, 150, (2, CHANNELS, *shape), generator=generator).float()}


def integers(made: Program):
    after, report = Pipeline(["quantize.integers"]).run(made)
    return after, report.steps[-1]


FORMS = {
    "patches": ((3, 3), {"stride": (3, 3)}),
    "patches that leave a rest": ((4, 2), {"stride": (4, 2)}),
    "single pixels": ((1, 1), {}),
    "every other pixel": ((1, 1), {"stride": (2, 2)}),
    "windows that overlap": ((3, 2), {"padding": (1, 0), "stride": (2, 1)}),
    "windows with holes": ((2, 3), {"padding": (2, 2), "dilation": (3, 2)}),
    "frames": ((3,), {"padding": 1}),
    "frames, every other": ((3,), {"padding": 1, "stride": 2}),
    "frames side by side": ((4,), {"stride": 4}),
}


@pytest.mark.parametrize("options", [
    {}, {"code": "int8"}, {"computed": True}, {"weight_zero": True}, {"bias": False, "zero": 0.0},
    {"computed": True, "weight_zero": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_the_convolution(form, options):
    kernel, attributes = FORMS[form]
    made = convolution(kernel, **attributes, **options)
    after, step = integers(made)
    assert [(c.site, c.reason) for c in step.changes] == [("conv", "sums in int32")] and not step.skips
    assert after.main.calls("integer_linear") and not after.main.calls("conv1d", "conv2d", "linear")
    expected = run(made.main, image(made))["y"]
    assert torch.equal(run(after.main, image(made))["y"], expected) and expected.abs().max() > 1000


@pytest.mark.parametrize(("kernel", "attributes", "length"), [
    ((3,), {"padding": 1}, T), ((2,), {"dilation": 2}, T + 2), ((4,), {"stride": 4}, 4 * T),
    ((2, 3), {"padding": (1, 1)}, T),
])  # fmt: skip
def test_lengths_may_vary(kernel, attributes, length):
    made = convolution(kernel, sizes=(length, 9)[: len(kernel)], **attributes)
    after, step = integers(made)
    assert len(step.changes) == 1
    for count in (1, 5, 16):
        inputs = image(made, *(length.evaluate({"length": count}), 9)[: len(kernel)])
        inputs["places"] = torch.arange(count)
        assert torch.equal(run(after.main, inputs)["y"], run(made.main, inputs)["y"])


def test_who_reads_windows_as_a_sequence_reads_the_layer():
    made = convolution((3, 3), stride=(3, 3))
    function = made.main
    build = function.builder()
    sequence = build.permute(build.reshape(function.results[0], shape=(B, OUTPUTS, 9)), dims=(0, 2, 1))
    function.set_outputs({"y": sequence})
    after, _ = integers(made)
    assert after.main.results[0].target.name == "mul"


@pytest.mark.parametrize(("form", "reason"), [
    ({"kernel": (3, 3), "groups": 4}, "it has groups"),
    ({"kernel": (4,), "stride": 2, "sizes": (2 * T + 2,)}, "apart on a dimension that varies"),
])  # fmt: skip
def test_others_stay_and_say_why(form, reason):
    made = convolution(**form)
    after, step = integers(made)
    assert [reason in skip.reason for skip in step.skips] == [True]
    assert [n.target.name for n in after.main.calls()] == [n.target.name for n in made.main.calls()]
