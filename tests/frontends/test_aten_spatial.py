"""Neighbourhoods, orders and scattered writes of torch: every converter against torch, all in one capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import CaptureError
from tersor.frontends.torch_export import capture
from tersor.ir import run

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 12, 10, generator=G)
W = torch.randn(8, 8, 3, 3, generator=G)
V = torch.randn(8, generator=G)
PLACES = torch.stack([torch.randperm(12, generator=G)[:3] for _ in range(120)]).reshape(2, 6, 10, 3).mT


def stepped(x):
    y = x.clone()
    y[:, ::2] = 0
    y[:, 1, 1:5:2] = 3
    return y


def put(x):
    y = x.clone()
    y[x > 1] = -1.0
    y[:, [1, 2], [0, 3]] = 7.0
    return y


# Functions of an image [2, 6, 12, 10].
FUNCTIONS = {
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, rounded up": lambda x: F.max_pool2d(x, 3, 2, 0, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x[:, :, 0], 2),
    "max_pool2d, no batch": lambda x: F.max_pool2d(x[0], (2, 3), dilation=(2, 1)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool2d, without padding": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "avg_pool2d, rounded up": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool2d, both": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool2d, divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_pool1d": lambda x: F.avg_pool1d(x[:, :, 0], 2),
    "adaptive means": lambda x: F.adaptive_avg_pool2d(x, (5, 7)),
    "one mean": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive maxima": lambda x: F.adaptive_max_pool2d(x, (5, 7)),
    "one maximum": lambda x: F.adaptive_max_pool1d(x[:, :, 0], 1),
    "nearest": lambda x: F.interpolate(x, (17, 7)),
    "nearest by a factor": lambda x: F.interpolate(x[:, :, 0], scale_factor=1.7),
    "nearest, exact": lambda x: F.interpolate(x, (17, 7), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, (17, 7), mode="bilinear"),
    "bilinear, corners": lambda x: F.interpolate(x, (17, 7), mode="bilinear", align_corners=True),
    "bilinear by a factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "linear": lambda x: F.interpolate(x[:, :, 0], 25, mode="linear"),
    "bicubic": lambda x: F.interpolate(x, (17, 7), mode="bicubic"),
    "bilinear, smoothed": lambda x: F.interpolate(x, (17, 7), mode="bilinear", antialias=True),
    "bicubic, smoothed": lambda x: F.interpolate(x, (17, 7), mode="bicubic", antialias=True),
    "the same size": lambda x: F.interpolate(x, (12, 10), mode="bicubic"),
    "transposed convolution": lambda x: F.conv_transpose2d(x, W[:6, :5], V[:5], 2, 1, 1),
    "transposed, apart": lambda x: F.conv_transpose2d(x, W[:6, :5, :2, :2], V[:5], 2),
    "transposed, groups": lambda x: F.conv_transpose2d(x, W[:6, :3], None, 2, 1, 0, 2),
    "transposed, one axis": lambda x: F.conv_transpose1d(x[:, :, 0], W[:6, :5, 0], V[:5], 3, 1),
    "transposed, dilated": lambda x: F.conv_transpose2d(x, W[:6, :5], None, 1, 1, 0, 1, 2),
    "convolution in groups": lambda x: F.conv2d(x, W[:6, :3], None, 1, 1, 1, 2),
    "convolution of the same size": lambda x: F.conv2d(x, W[:5, :6, :2, :2], None, 1, "same"),
    "instance norm": lambda x: F.instance_norm(x, weight=V[:6], bias=V[:6]),
    "reflected": lambda x: F.pad(x, (2, 3, 1, 0), mode="reflect"),
    "replicated": lambda x: F.pad(x, (2, 3, 1, 0), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 3, 1, 0), mode="circular"),
    "cut and padded": lambda x: F.pad(x, (-1, 3, 1, -2), value=1.5),
    "windows": lambda x: x.unfold(2, 3, 2),
    "windows as columns": lambda x: F.unfold(x, 3, 1, 1, 2),
    "columns as an image": lambda x: F.fold(F.unfold(x, 2, 1, 0, 2), (12, 10), 2, 1, 0, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x[:, :4], 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "grid sample": lambda x: F.grid_sample(x, x[:, :2, :4, :5].permute(0, 2, 3, 1), align_corners=False),
    "sort": lambda x: torch.stack((x.sort(-1)[0], x.sort(1, descending=True)[0])),
    "argsort": lambda x: torch.argsort(x, dim=2, stable=True),
    "topk": lambda x: x.topk(3, 2)[0] + x.topk(3, 2)[1] + x.topk(3, 2, largest=False)[0],
    "smallest": lambda x: x.min(1)[0] + x.min(1)[1] + x.argmin() + x.argmin(1),
    "scatter": lambda x: x.scatter(2, PLACES, x[:, :, :5]) + x.scatter(2, PLACES, 1.5),
    "scatter_add": lambda x: x.scatter_add(2, PLACES * 0, x[:, :, :3]),
    "scatter_reduce": lambda x: x.scatter_reduce(2, PLACES % 4, x[:, :, :3], "amax"),
    "index_add": lambda x: x.index_add(1, torch.tensor([1, 1]), x[:, :2]),
    "assignments": lambda x: put(x) + stepped(x),
    "one hot": lambda x: F.one_hot(x.argmax(-1), 10),
    "einsum": lambda x: torch.einsum("bchw,bchv->bcwv", x, x) + torch.einsum("bchw->bc", x)[:, :, None, None],
    "rounded": lambda x: (x * 3).trunc() + (x * 3).frac() + torch.fmod(x, 0.7) + (x * 2).round(),
    "functions": lambda x: x.tan().clamp(-9, 9) + x.sinh() + x.cosh() + x.exp2() + x.erfc(),
    "logarithms": lambda x: x.abs().log2() + x.abs().log10(),
    "exclusive or": lambda x: torch.logical_xor(x > 0, x > 1) ^ x.isnan(),
    "numbers as bases": lambda x: 2.0**x + torch.var_mean(x, 1)[1][:, None],
    "splits": lambda x: torch.cat(x.tensor_split(4, 1)[::-1], 1).swapaxes(1, 2),
}  # fmt: skip


class Everything(nn.Module):
    def forward(self, x):
        return {name: function(x) for name, function in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def results():
    program = capture(Everything(), {"x": X})
    return run(program.main, {"x": X}), Everything()(X)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(results, name):
    actual, expected = (r[name] for r in results)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda x: x.scatter_reduce(2, PLACES, x[:, :, :3], "mean"), "mean"),
        (
            lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True, align_corners=True),
            "antialias",
        ),
        (lambda x: F.conv3d(x[:, None], W[:1, :1, None]), "3 dimensions"),
    ],
)
def test_what_the_dialect_lacks_is_refused(function, part):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(CaptureError, match=part):
        capture(Model(), (X,))


def test_a_dynamic_size_cannot_be_resized():
    class Model(nn.Module):
        def forward(self, x):
            return F.interpolate(x, scale_factor=2.0, mode="bilinear")

    with pytest.raises(CaptureError, match="resizes"):
        capture(Model(), {"x": X}, {"x": {2: ("height", 4, 20)}})
