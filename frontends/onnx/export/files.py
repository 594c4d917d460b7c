"""The ONNX model as a whole, with its tensors inside or in a file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tersor.errors import InputError
from tersor.folders import new_files
from tersor.frontends.onnx.export.graph import TYPE_CODES, Writer, describe_tensor, raw_bytes, tensor_proto
from tersor.frontends.onnx.provenance import DIMS
from tersor.ir import Value

IR_VERSION = 10  # the first one in which nodes have metadata
LARGEST = (1 << 31) - (64 << 20)  # a protocol buffer holds 2 GiB; the rest is for the graph
INSIDE = 1024  # bytes; smaller tensors stay in the model, where shape inference can see them
PAGE = 4096  # tensors beside the model begin at one, so that they can be mapped


def check_path(path: str | Path) -> Path:
    """The path of a file that may be written.

    Raises:
        InputError: its name is not that of an ONNX file, or its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise InputError(f"{str(path)!r} does not end in .onnx", fix=f"write to {path.name}.onnx")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {str(path.parent)!r}", fix="make it first")
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder", fix="choose another name")
    return path


def model_with_data(writer: Writer) -> Any:
    """A ModelProto that holds all tensors.

    Raises:
        InputError: it would be too large.
    """
    model = _model(writer)
    _refuse_large(writer.stored)
    for name, tensor in writer.stored.items():
        model.graph.initializer.append(tensor_proto(writer.onnx, name, tensor))
    return model


def write_model(writer: Writer, path: Path, external_data: bool | None) -> None:
    """Writes the model, with its tensors beside it where asked for or where it is too large without."""
    if external_data is None:
        external_data = _bytes(writer.stored) > LARGEST
    try:
        if not external_data:
            with new_files(path) as (file,):
                file.write_bytes(model_with_data(writer).SerializeToString())
            return
        beside = path.with_name(f"{path.name}.data")
        with new_files(beside, path) as (data, file):
            model = _model(writer)
            _write_tensors(writer, model, data, beside.name)
            file.write_bytes(model.SerializeToString())
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}; nothing was left there",
            why=str(error),
            fix="check the place and the free space",
        ) from error


def _write_tensors(writer: Writer, model: Any, data: Path, location: str) -> None:
    """One tensor after the other, so that no second copy of all of them is in memory."""
    with open(data, "wb") as file:
        for name, tensor in writer.stored.items():
            if tensor.nbytes < INSIDE:
                model.graph.initializer.append(tensor_proto(writer.onnx, name, tensor))
                continue
            file.write(b"\0" * (-file.tell() % PAGE))
            proto = describe_tensor(writer.onnx, name, tensor)
            proto.data_location = writer.onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", file.tell()), ("length", tensor.nbytes)):
                proto.external_data.add(key=key, value=str(value))
            file.write(raw_bytes(tensor))
            model.graph.initializer.append(proto)


def _model(writer: Writer) -> Any:
    """Everything but the stored tensors."""
    helper, function = writer.onnx.helper, writer.function
    graph = helper.make_graph(
        list(writer.operators()),
        function.name,
        [_described(helper, name, value) for name, value in writer.inputs.items()],
        [_described(helper, name, node.meta["value"]) for name, node in writer.results.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(d, v) for d, v in writer.domains.items()],
        ir_version=IR_VERSION,
        producer_name="tersor",
        producer_version=metadata.version("tersor"),
    )
    if function.dims:
        ranges = {name: [r.min, r.max] for name, r in function.dims.items()}
        model.metadata_props.add(key=DIMS, value=json.dumps(ranges))
    return model


def _described(helper: Any, name: str, value: Value) -> Any:
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return helper.make_tensor_value_info(name, TYPE_CODES[value.dtype], shape)


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _refuse_large(tensors: Mapping[str, torch.Tensor]) -> None:
    if _bytes(tensors) > LARGEST:
        raise InputError(
            f"the model's tensors take {_bytes(tensors) / 1e9:.1f} GB",
            why="an ONNX model in one piece holds 2 GB",
            fix="write it to a file with external_data=True",
        )
