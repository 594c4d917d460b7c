"""Operations that combine elements along dimensions as ONNX operators."""

from __future__ import annotations

from tersor.frontends.onnx.export.table import Export, exports

_REDUCTIONS = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin"}


@exports(*_REDUCTIONS)
def _reduce(e: Export) -> str:
    through = "int32" if e.result.dtype == "bool" else e.result.dtype
    axes = e.sizes(tuple(d % e.value(0).rank for d in e.attribute("dims")))
    operator = _REDUCTIONS[e.node.target.name]
    made = e.emit(operator, e.operand(0, through), axes, keepdims=int(e.attribute("keepdim")))
    return e.cast(made, through, e.result.dtype)


@exports("argmax")
def _argmax(e: Export) -> str:
    return e.emit("ArgMax", e.operand(0), axis=e.axis(0), keepdims=int(e.attribute("keepdim")))


@exports("argsort")
def _argsort(e: Export) -> str:
    through = "int32" if e.value(0).dtype == "bool" else e.value(0).dtype
    count = e.sizes((e.value(0).shape[e.axis(0)],))
    return e.emit(
        "TopK", e.operand(0, through), count, axis=e.axis(0), largest=int(e.attribute("descending")), result=1
    )


@exports("softmax")
def _softmax(e: Export) -> str:
    return e.emit("Softmax", e.operand(0), axis=e.axis(0))


@exports("log_softmax")
def _log_softmax(e: Export) -> str:
    return e.emit("LogSoftmax", e.operand(0), axis=e.axis(0))
