"""An ONNX file as plain Python: operators, tensors, inputs. Whatever is damaged in a file is one typed error.

Protocol buffers stay in this module. Tensors are read when they are needed; external data is read only from inside
the folder of the model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor.errors import CaptureError, InputError, TersorError
from tersor.frontends.onnx.package import import_onnx
from tersor.frontends.onnx.provenance import module_path, source_line, told_ranges, told_site
from tersor.ir import Range
from tersor.ir.value import DTYPES

OPSETS = range(11, 24)  # of the standard operators
STANDARD = ""  # the standard domain, which files also call ai.onnx
LARGEST_RANK = 8

# TensorProto.DataType; numpy's name where the bytes are that, the program's name of the type.
TYPES: dict[int, tuple[str, str]] = {
    1: ("<f4", "float32"), 2: ("u1", "uint8"), 3: ("i1", "int8"), 5: ("<i2", "int16"), 6: ("<i4", "int32"),
    7: ("<i8", "int64"), 9: ("?", "bool"), 10: ("<f2", "float16"), 11: ("<f8", "float64"), 16: ("<i2", "bfloat16"),
}  # fmt: skip
_TYPE_NAMES = {4: "uint16", 8: "string", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128"}


def dtype_name(code: int) -> str:
    """The program's name of an ONNX element type.

    Raises:
        CaptureError: programs have no such type.
    """
    if code not in TYPES:
        raise CaptureError(
            f"the model computes with elements of type {_TYPE_NAMES.get(code, f'number {code}')}",
            why=f"a program has {', '.join(DTYPES)}",
        )
    return TYPES[code][1]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file that has not been read yet."""

    proto: Any
    folder: Path | None

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def dtype(self) -> str:
        return dtype_name(self.proto.data_type)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.proto.dims)

    def read(self) -> torch.Tensor:
        """The tensor, sharing memory with the file's contents where possible.

        Raises:
            InputError: its data has another length than its shape says, is missing, or lies outside the folder.
            CaptureError: programs have no such element type.
        """
        try:
            return self._read()
        except TersorError as error:
            raise type(error)(
                error.what, where=f"tensor {self.name!r}", why=error.why, fix=error.fix
            ) from error

    def _read(self) -> torch.Tensor:
        numpy_type, name = TYPES[self.proto.data_type] if self.dtype else ("", "")
        shape = self.shape
        if len(shape) > LARGEST_RANK or any(d < 0 for d in shape):
            raise InputError(f"its shape is {list(shape)}")
        count = math.prod(shape)
        if self.proto.data_location == 1:
            data: Any = self._external(count * np.dtype(numpy_type).itemsize)
        elif self.proto.HasField("raw_data"):
            data = self.proto.raw_data
        else:
            return self._typed(count).reshape(shape)
        if len(data) != count * np.dtype(numpy_type).itemsize:
            raise InputError(f"it has {len(data)} bytes of data", why=f"its shape is {list(shape)} of {name}")
        if not count:
            return torch.empty(shape, dtype=DTYPES[name])
        array = np.frombuffer(data, dtype=numpy_type)
        # torch wants memory that may be written to; nothing writes to parameters.
        array = array.copy() if not array.flags.writeable else array
        tensor = torch.from_numpy(array)
        return (tensor.view(torch.bfloat16) if name == "bfloat16" else tensor).reshape(shape)

    def _typed(self, count: int) -> torch.Tensor:
        """Data in the field of its type; half floats are bit patterns in the field of integers."""
        name = self.dtype
        values = {
            "float32": self.proto.float_data, "float64": self.proto.double_data, "int64": self.proto.int64_data,
        }.get(name, self.proto.int32_data)  # fmt: skip
        if len(values) != count:
            raise InputError(f"it has {len(values)} values", why=f"its shape is {list(self.shape)} of {name}")
        array = np.array(values)
        if name in ("float16", "bfloat16"):
            bits = torch.from_numpy(array.astype(np.uint16).view(np.int16))
            return bits.view(DTYPES[name])
        return torch.from_numpy(array).to(DTYPES[name])

    def _external(self, size: int) -> np.ndarray:
        entries = {_text(e.key): _text(e.value) for e in self.proto.external_data}
        if self.folder is None:
            raise InputError("its data is in another file", fix="give the path of the model's file")
        location = entries.get("location", "")
        path = self.folder / location
        try:
            inside = bool(location) and path.resolve().is_relative_to(self.folder.resolve())
            found = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, links in a circle
            raise InputError(
                f"its data is said to be in {location[:80]!r}", why=f"that is no path: {error}"
            ) from error
        if not inside:
            raise InputError(
                f"its data is said to be in {location!r}",
                why="a model's data is read only from inside its own folder",
                fix="do not load models from people you do not trust; else move the data beside the model",
            )
        if not found:
            raise InputError(f"its data file {location!r} is missing", fix=f"put it into {self.folder}")
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        except ValueError:
            raise InputError(f"the place of its data is {entries}") from None
        if offset < 0 or length != size or offset + length > path.stat().st_size:
            raise InputError(
                f"its data is said to be bytes {offset} to {offset + length} of {location!r}",
                why=f"the file has {path.stat().st_size} bytes, the tensor needs {size}",
            )
        return np.fromfile(path, dtype=np.uint8, count=length, offset=offset)


@dataclass(frozen=True)
class Reference:
    """An attribute inside a function of the file: the caller's attribute of this name."""

    name: str


@dataclass(frozen=True)
class Operator:
    """One node of the file.

    Attributes:
        domain: "" for standard operators.
        attributes: numbers, strings, lists of them, `StoredTensor`, `Graph`, `Reference`.
        module: path of the module it came from, where the exporter wrote it down; "" otherwise.
        source: file and line, likewise.
        told_site: the operation of a program that it is part of, and that one's site, in files that we wrote.
    """

    name: str
    domain: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    module: str
    source: str
    told_site: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.domain}.{self.op}" if self.domain else self.op


@dataclass(frozen=True)
class Input:
    """An input of the file: its sizes are numbers, names, or None where the file leaves one open."""

    name: str
    dtype: str
    sizes: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Graph:
    """Operators in an order in which each comes after what it reads."""

    operators: tuple[Operator, ...]
    tensors: Mapping[str, StoredTensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class LocalFunction:
    """A function that the file defines itself."""

    graph: Graph
    opsets: Mapping[str, int]
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What a file holds; files that we wrote tell the ranges of their named dimensions."""

    graph: Graph
    inputs: tuple[Input, ...]
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str], LocalFunction]
    ranges: Mapping[str, Range] = field(default_factory=dict)


def read_model(source: Any) -> Model:
    """Reads a path, or an ``onnx.ModelProto``.

    Raises:
        InputError: the package onnx is missing, the file is missing or damaged, or of an opset that is not known.
    """
    onnx = import_onnx("reading ONNX files")
    folder = None
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise InputError(f"there is no file {str(path)!r}", fix="give the path of an ONNX file")
        folder, proto = path.parent, onnx.ModelProto()
        try:
            proto.ParseFromString(path.read_bytes())
        except Exception as error:  # protobuf's own exceptions differ between its implementations
            raise InputError(f"{str(path)!r} is not an ONNX file, or is damaged", why=str(error)) from error
    elif isinstance(source, onnx.ModelProto):
        proto = source
    else:
        raise InputError(f"the model is a {type(source).__name__}", fix="give a path or an onnx.ModelProto")
    return _Reader(folder).model(proto)


@dataclass(frozen=True)
class _Reader:
    folder: Path | None

    def model(self, proto: Any) -> Model:
        opsets = _opsets(proto.opset_import)
        if not proto.graph.output or not opsets:
            raise InputError("the ONNX file has no graph with outputs, or is damaged")
        version = opsets.get(STANDARD, OPSETS.stop - 1)
        if version not in OPSETS:
            raise InputError(
                f"the ONNX file is of opset {version}",
                why=f"opsets {OPSETS.start} to {OPSETS.stop - 1} are known",
                fix=f"export the model again with opset_version={min(max(version, 18), OPSETS.stop - 1)}",
            )
        graph = self.graph(proto.graph)
        inputs = tuple(_input(i) for i in proto.graph.input if i.name not in graph.tensors)
        functions = {}
        for f in proto.functions:
            body = Graph(self.operators(f.node), {}, tuple(f.input), tuple(f.output))
            defaults = {a.name: self.attribute(a) for a in f.attribute_proto}
            functions[_domain(f.domain), f.name] = LocalFunction(body, _opsets(f.opset_import), defaults)
        told = {_text(m.key): _text(m.value) for m in proto.metadata_props}
        return Model(graph, inputs, opsets, functions, told_ranges(told))

    def graph(self, proto: Any) -> Graph:
        if proto.sparse_initializer:
            raise CaptureError("the model stores sparse tensors", why="programs have none")
        tensors = {_text(t.name): StoredTensor(t, self.folder) for t in proto.initializer}
        return Graph(
            self.operators(proto.node),
            tensors,
            tuple(_text(i.name) for i in proto.input),
            tuple(_text(o.name) for o in proto.output),
        )

    def operators(self, protos: Sequence[Any]) -> tuple[Operator, ...]:
        return _sorted([self.operator(p) for p in protos])

    def operator(self, proto: Any) -> Operator:
        metadata = {_text(m.key): _text(m.value) for m in proto.metadata_props}
        return Operator(
            _text(proto.name),
            _domain(proto.domain),
            _text(proto.op_type),
            tuple(map(_text, proto.input)),
            tuple(map(_text, proto.output)),
            {_text(a.name): self.attribute(a) for a in proto.attribute},
            module_path(proto.name, metadata),
            source_line(metadata),
            told_site(metadata),
        )

    def attribute(self, proto: Any) -> Any:
        if proto.ref_attr_name:
            return Reference(_text(proto.ref_attr_name))
        match proto.type:
            case 1:
                return proto.f
            case 2:
                return proto.i
            case 3:
                return proto.s.decode(errors="replace")
            case 4:
                return StoredTensor(proto.t, self.folder)
            case 5:
                return self.graph(proto.g)
            case 6:
                return list(proto.floats)
            case 7:
                return list(proto.ints)
            case 8:
                return [s.decode(errors="replace") for s in proto.strings]
        raise CaptureError(f"attribute {proto.name!r} is of kind {proto.type}, which is not known")


def _domain(domain: str) -> str:
    return STANDARD if domain == "ai.onnx" else _text(domain)


def _text(name: str | bytes) -> str:
    """A name; protobuf hands out bytes where they are no text."""
    if not isinstance(name, str):
        raise InputError("the ONNX file is damaged: a name is not text", where=repr(name[:80]))
    return name


def _opsets(imports: Any) -> dict[str, int]:
    return {_domain(o.domain): o.version for o in imports}


def _input(proto: Any) -> Input:
    if not proto.type.HasField("tensor_type"):
        raise CaptureError(f"input {proto.name!r} is not a tensor", why="programs take tensors")
    tensor = proto.type.tensor_type
    if not tensor.HasField("shape"):
        raise CaptureError(
            f"the file does not say how many axes input {proto.name!r} has",
            fix="export the model again with its inputs' shapes",
        )
    sizes: list[int | str | None] = []
    for d in tensor.shape.dim:
        # Old exporters write -1 for a size that they leave open.
        sizes.append(
            _text(d.dim_param) or (d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None)
        )
    return Input(_text(proto.name), dtype_name(tensor.elem_type), tuple(sizes))


def _sorted(operators: list[Operator]) -> tuple[Operator, ...]:
    """In the order of the data; some optimisers write another one.

    Raises:
        InputError: operators read each other in a circle, or write one value twice.
    """
    makers: dict[str, int] = {}
    for i, operator in enumerate(operators):
        for output in filter(None, operator.outputs):
            if makers.setdefault(output, i) != i:
                raise InputError(f"the ONNX file is damaged: two operators make {output!r}")
    waiting, readers = [0] * len(operators), [[] for _ in operators]
    for i, operator in enumerate(operators):
        for source in {makers[n] for n in reads(operator) if n in makers}:
            waiting[i] += 1
            readers[source].append(i)
    ready = deque(i for i, count in enumerate(waiting) if not count)
    order = []
    while ready:
        i = ready.popleft()
        order.append(i)
        for reader in readers[i]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if len(order) < len(operators):
        stuck = next(o for i, o in enumerate(operators) if waiting[i])
        raise InputError(
            "the ONNX file is damaged: operators read each other in a circle", where=stuck.name or stuck.op
        )
    return tuple(operators[i] for i in order)


def reads(operator: Operator) -> Iterator[str]:
    """Names of values that an operator reads, those that the graphs inside it read from outside included."""
    yield from filter(None, operator.inputs)
    for attribute in operator.attributes.values():
        if isinstance(attribute, Graph):
            for inner in attribute.operators:
                yield from reads(inner)
            yield from attribute.outputs
