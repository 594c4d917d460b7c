"""Small valid ONNX files to damage: written by hand, and by both of torch's exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

WIDTH = 4


class Encoder(nn.Module):
    """One Transformer layer over token ids, spelt out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 2.0 + (1.0 - mask[:, None, None, :].float()) * -1e9
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def originals(exported: bool = True) -> list[onnx.ModelProto]:
    """All of them; those that torch exports take a few seconds."""
    made = [_dense(), _function(), _branch(), _quantized(), _norm(), _convolution(), _lookup()]
    if exported:
        made += _exports()
    return made


def _model(nodes, tensors, inputs=None, opset: int = 17, **more) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    graph = helper.make_graph(
        nodes,
        "small",
        inputs or [x],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", ())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _node(op: str, inputs: str, outputs: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(
        op, inputs.split(), outputs.split(), name=f"/{outputs.split()[0]}/{op}", **attributes
    )


def _dense() -> onnx.ModelProto:
    nodes = [
        _node("MatMul", "x w", "a"),
        _node("Add", "a b", "h"),
        _node("Shape", "h", "s"),
        _node("Gather", "s zero", "n"),
        _node("Unsqueeze", "n first", "n1"),
        _node("Concat", "n1 rest", "shape", axis=0),
        _node("Reshape", "h shape", "r"),
        _node("Slice", "r first two last", "c"),
        _node("Softmax", "c", "y", axis=-1),
    ]
    return _model(
        nodes,
        {
            "w": _random(WIDTH, 6),
            "b": _random(6),
            "zero": np.array(0),
            "first": np.array([0]),
            "rest": np.array([2, -1]),
            "two": np.array([2]),
            "last": np.array([-1]),
        },
    )


def _function() -> onnx.ModelProto:
    body = [_node("Relu", "a", "r"), _node("Add", "r a", "b")]
    twice = helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)], [])
    nodes = [_node("Twice", "x", "t", domain="mine"), _node("Twice", "t", "y", domain="mine")]
    return _model(nodes, {}, functions=[twice], opsets=[helper.make_opsetid("mine", 1)])


def _branch() -> onnx.ModelProto:
    def body(value: float) -> onnx.GraphProto:
        nodes = [helper.make_node("Constant", [], ["c"], value_float=value), _node("Mul", "x c", "out")]
        return helper.make_graph(nodes, "body", [], [helper.make_empty_tensor_value_info("out")])

    nodes = [
        _node("Shape", "x", "s", start=1),
        _node("Squeeze", "s", "n"),
        _node("Equal", "n four", "same"),
        _node("If", "same", "y", then_branch=body(2.0), else_branch=body(3.0)),
    ]
    return _model(nodes, {"four": np.array(4)})


def _quantized() -> onnx.ModelProto:
    nodes = [
        _node("QuantizeLinear", "x scale zero", "q"),
        _node("DequantizeLinear", "q scale zero", "d"),
        _node("DequantizeLinear", "w ws wz", "wd", axis=1),
        _node("MatMul", "d wd", "y"),
    ]
    codes = np.random.default_rng(0).integers(-128, 127, (WIDTH, 3)).astype(np.int8)
    return _model(
        nodes,
        {
            "scale": np.float32(0.1),
            "zero": np.uint8(3),
            "w": codes,
            "ws": np.float32([0.1, 0.2, 0.3]),
            "wz": np.int8([0, 1, 2]),
        },
    )


def _norm() -> onnx.ModelProto:
    nodes = [
        _node("ReduceMean", "x", "m", axes=[-1]),
        _node("Sub", "x m", "c"),
        _node("Mul", "c c", "cc"),
        _node("ReduceMean", "cc", "v", axes=[-1]),
        _node("Add", "v eps", "ve"),
        _node("Sqrt", "ve", "sd"),
        _node("Div", "c sd", "n"),
        _node("Mul", "n gain", "g"),
        _node("Erf", "g", "e"),
        _node("Where", "flag g e", "y"),
    ]
    return _model(
        nodes,
        {"eps": np.float32(1e-5), "gain": _random(WIDTH), "flag": np.array([True, False, True, True])},
        opset=13,
    )


def _convolution() -> onnx.ModelProto:
    nodes = [
        _node("Conv", "x w b", "c", strides=[2, 2], pads=[0, 0, 0, 0]),
        _node("Flatten", "c", "f", axis=2),
        _node("Transpose", "f", "t", perm=[0, 2, 1]),
        _node("LayerNormalization", "t g", "y", axis=-1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    return _model(nodes, {"w": _random(4, 3, 2, 2), "b": _random(4), "g": _random(4)}, [x])


def _lookup() -> onnx.ModelProto:
    nodes = [
        _node("Gather", "table ids", "e"),
        _node("Range", "zero n one", "p"),
        _node("Gather", "places p", "pe"),
        _node("Add", "e pe", "s"),
        _node("CumSum", "s one", "cs"),
        _node("Tile", "cs repeats", "y"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 5])
    return _model(
        nodes,
        {
            "table": _random(9, WIDTH),
            "places": _random(5, WIDTH),
            "zero": np.array(0),
            "n": np.array(5),
            "one": np.array(1),
            "repeats": np.array([1, 2, 1]),
        },
        [ids],
        opset=15,
    )


def _exports() -> list[onnx.ModelProto]:
    torch.manual_seed(0)
    model = Encoder().eval()
    inputs = {"ids": torch.randint(0, 9, (2, 5)), "mask": torch.ones(2, 5, dtype=torch.int64)}
    with _quiet(), torch.no_grad():
        file = io.BytesIO()
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            file,
            input_names=list(inputs),
            output_names=["y"],
            opset_version=17,
            dynamo=False,
            dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs},
        )
        batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=1, max=64)
        program = torch.onnx.export(
            model,
            (),
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes={n: {0: batch, 1: length} for n in inputs},
        )
    return [onnx.load_from_string(file.getvalue()), program.model_proto]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
