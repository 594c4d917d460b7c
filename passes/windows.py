"""Linear layers over the numbers in each window, in place of convolutions."""

from __future__ import annotations

from torch import fx

from tersor.ir import Function
from tersor.ir.dims import product
from tersor.ir.matching import is_call


def replace_by_layer(
    function: Function, conv: fx.Node, made_by: str, windows: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    """Puts ``linear(windows, weight, bias)`` in the place of a convolution, and returns it.

    The layer's result is [B, P, N] for P windows; who reads the convolution's in that form reads it directly, others as
    an image [B, N, ...].
    """
    build = function.builder(before=conv, made_by=made_by)
    linear = build.emit("linear", windows, weight, bias, site=conv.meta.pop("site", None))
    for key in ("module", "source"):
        if key in conv.meta:
            linear.meta[key] = conv.meta[key]
    batch, n, *counts = conv.meta["value"].shape
    sequence = (batch, n, product(counts))
    for image in [conv, *(user for user in conv.users if is_call(user, "reshape"))]:
        if image.meta["value"].shape == sequence:
            for moved in list(image.users):
                if is_call(moved, "permute") and tuple(moved.kwargs["dims"]) == (0, 2, 1):
                    function.replace(moved, linear)
    if not conv._erased:
        image = build.permute(linear, dims=(0, 2, 1))
        if len(counts) > 1:
            image = build.reshape(image, shape=conv.meta["value"].shape)
        function.replace(conv, image)
    return linear
