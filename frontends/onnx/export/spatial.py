"""Pooling and resampling as ONNX operators."""

from __future__ import annotations

from tersor.frontends.onnx.export.table import Export, exports


@exports("max_pool2d")
def _max_pool2d(e: Export) -> str:
    return e.emit("MaxPool", e.operand(0), **_windows(e), dilations=list(e.attribute("dilation")))


@exports("avg_pool2d")
def _avg_pool2d(e: Export) -> str:
    return e.emit(
        "AveragePool", e.operand(0), **_windows(e), count_include_pad=int(e.attribute("count_padding"))
    )


def _windows(e: Export) -> dict[str, list[int]]:
    padding = list(e.attribute("padding"))
    return {
        "kernel_shape": list(e.attribute("kernel")),
        "strides": list(e.attribute("stride")),
        "pads": padding * 2,
    }


@exports("resample")
def _resample(e: Export) -> str:
    """The taps side by side, weighted and added."""
    axis, table, rank = e.axis(0), e.value(1).shape, e.value(0).rank
    taken = e.emit("Gather", e.operand(0), e.operand(1), axis=axis)
    weights = e.reshape(e.operand(2), table, (*table, *(1,) * (rank - axis - 1)))
    return e.emit("ReduceSum", e.emit("Mul", taken, weights), e.sizes((axis + 1,)), keepdims=0)
