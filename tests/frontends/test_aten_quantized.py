"""Graphs as PT2E makes them: their codes become the dialect's, and products of codes integer products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torch.ao.quantization.fx._decomposed")

from tersor import frontends  # noqa: E402
from tersor.errors import CaptureError  # noqa: E402
from tersor.passes import Pipeline  # noqa: E402

library = torch.ops.quantized_decomposed
X = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(0))}


class Layer(nn.Module):
    """A linear layer between codes, in the form that convert_pt2e leaves behind."""

    def __init__(self, low: int = -128, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.randint(-127, 128, (6, 8), generator=random).to(torch.int8))
        self.register_buffer("scale", torch.rand(6, generator=random) / 50 + 0.01)
        self.register_buffer("zero", torch.zeros(6, dtype=torch.int64))
        self.bias = nn.Parameter(torch.randn(6, generator=random))
        self.form = (
            0.02,
            -11 if dtype == torch.int8 else 117,
            low,
            127 if dtype == torch.int8 else 255,
            dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = library.dequantize_per_tensor(library.quantize_per_tensor(x, *self.form), *self.form)
        w = library.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
        return nn.functional.linear(x, w, self.bias)


@pytest.mark.parametrize("low, dtype", [(-128, torch.int8), (-100, torch.int8), (0, torch.uint8)])
def test_a_layer_of_codes(low, dtype):
    model = Layer(low, dtype).eval()
    program = frontends.capture(model, X)
    names = [n.target.name for n in program.main.calls()]
    assert names.count("dequantize") == 2 and names.count("quantize") == 1 and "linear" in names
    torch.testing.assert_close(program(**X)["output"], model(**X), rtol=1e-5, atol=1e-5)
    whole, report = Pipeline(["quantize.integers"]).run(program)
    assert not report.steps[0].skips and "integer_linear" in [n.target.name for n in whole.main.calls()]
    torch.testing.assert_close(whole(**X)["output"], model(**X), rtol=1e-5, atol=2e-3)


def test_a_scale_for_each_channel():
    class PerChannel(nn.Module):
        def forward(self, x):
            scale, zero = torch.linspace(0.01, 0.03, 8), torch.arange(8)
            codes = library.quantize_per_channel(x, scale, zero, 1, -128, 127, torch.int8)
            return library.dequantize_per_channel(codes, scale, zero, 1, -128, 127, torch.int8)

    program = frontends.capture(PerChannel(), X)
    torch.testing.assert_close(program(**X)["output"], PerChannel()(**X))


def test_other_codes_are_refused():
    class Wide(nn.Module):
        def forward(self, x):
            codes = library.quantize_per_tensor(x, 0.1, 0, -32768, 32767, torch.int16)
            return library.dequantize_per_tensor(codes, 0.1, 0, -32768, 32767, torch.int16)

    with pytest.raises(CaptureError, match="int16"):
        frontends.capture(Wide(), X)
