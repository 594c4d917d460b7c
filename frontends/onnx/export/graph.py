"""An ONNX graph being written: names, operators, constants, and sizes that are computed at run time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tersor.frontends.onnx.package import import_onnx
from tersor.frontends.onnx.provenance import write_provenance
from tersor.frontends.onnx.reader import TYPES
from tersor.ir import Dim, Function, Value
from tersor.ir.dims import Shape
from tersor.ir.matching import is_call

TYPE_CODES = {name: code for code, (_, name) in TYPES.items()}


class Writer:
    """The graph of one function.

    Attributes:
        inputs, results: of the graph, by name. A state is both: as the call finds it, and ``<name>.next``.
        names: the name of each node's value.
        stored: tensors of the file by name; `transposed` are those that the file holds transposed.
        split: values [B, T, H*D] that exist as [B, H, T, D] too, by node and number of heads.
        domains: of the operators, with their versions.
    """

    def __init__(self, function: Function, opset: int):
        self.function, self.opset = function, opset
        self.onnx = import_onnx("writing ONNX files")
        self._used: set[str] = set()
        self.names: dict[fx.Node, str] = {n: _unique(n.target, self._used) for n in function.input_nodes}
        # One name means one value in ONNX: where names of a program coincide, the later one gets a number.
        self.results = {
            _unique(name, self._used): node
            for name, node in zip(function.outputs, function.results, strict=True)
        }
        for name, node in function.state_nodes.items():
            self.names[node] = _unique(name, self._used)
            self.results[_unique(f"{name}.next", self._used)] = function.updates.get(name, node)
        self.inputs = {name: node.meta["value"] for node, name in self.names.items()}
        self.stored: dict[str, torch.Tensor] = {}
        self.transposed: set[str] = set()
        self.split: dict[tuple[fx.Node, int], str] = {}
        self.domains: dict[str, int] = {"": opset}
        self._operators: list[Any] = []
        self._made: dict[tuple[Any, ...], str] = {}
        self._dims: dict[Dim, str] = {}
        self._used_labels: set[str] = set()

        self._store_parameters()

    def _store_parameters(self) -> None:
        """Tied ones once."""
        owners = self.function.parameters.tied()
        readers: dict[str, list[fx.Node]] = {}
        for node in self.function.graph.find_nodes(op="get_attr"):
            readers.setdefault(owners.get(node.target, node.target), []).append(node)
        for owner, nodes in readers.items():
            name, tensor = _unique(owner, self._used), self.function.parameters[owner].tensor
            self.names.update(dict.fromkeys(nodes, name))
            if all(_only_multiplies(node) for node in nodes):
                self.transposed.add(name)
                tensor = tensor.t()
            self.stored[name] = tensor

    # -- values

    def type_code(self, dtype: str) -> int:
        """TensorProto.DataType."""
        return TYPE_CODES[dtype]

    def unique(self, name: str) -> str:
        """A name for a value that no other value has."""
        return _unique(re.sub(r"[^\w.]", "_", name), self._used)

    def emit(
        self,
        node: fx.Node | None,
        operator: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any],
        domain: str = "",
        result: int = 0,
    ) -> str:
        """One operator that ``node`` becomes (or that sizes need); returns the name of its result."""
        given = {name: a for name, a in attributes.items() if a is not None}
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.domains.setdefault(domain, 1)
        key = domain, operator, tuple(inputs), json.dumps(given, sort_keys=True, default=str), result
        if key not in self._made:
            name = self.unique(node.name if node else "size")
            unread = [self.unique(f"{name}_unread") for _ in range(result)]
            self._append(node, operator, inputs, [*unread, name], given, domain)
            self._made[key] = name
        return self._made[key]

    def _append(
        self,
        node: fx.Node | None,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Mapping[str, Any],
        domain: str = "",
    ) -> None:
        label = ""
        if node is not None:
            place = node.meta.get("site") or node.meta.get("module") or node.name
            label = _unique(f"/{place.replace('.', '/')}/{operator}", self._used_labels)
        proto = self.onnx.helper.make_node(
            operator, list(inputs), list(outputs), name=label, domain=domain, **attributes
        )
        if node is not None:
            write_provenance(proto, node)
        self._operators.append(proto)

    def constant(self, tensor: torch.Tensor) -> str:
        """A tensor without a name: numbers, shapes, tables that an exporter makes up."""
        tensor = tensor.contiguous()
        key = "Constant", str(Value.of(tensor)), bytes(raw_bytes(tensor))
        if key not in self._made:
            name = self.unique("constant")
            self._append(None, "Constant", (), [name], {"value": tensor_proto(self.onnx, "", tensor)})
            self._made[key] = name
        return self._made[key]

    # -- sizes

    def sizes(self, shape: Shape | Sequence[int | Dim]) -> str:
        """Sizes as a vector of int64: a constant, or computed from the inputs' shapes."""
        parts: list[str] = []
        run: list[int] = []
        for size in (*shape, None):
            if isinstance(size, int):
                run.append(size)
                continue
            if run or (size is None and not parts):
                parts.append(self.constant(torch.tensor(run, dtype=torch.int64)))
                run = []
            if size is not None:
                parts.append(self.size(size))
        return parts[0] if len(parts) == 1 else self.emit(None, "Concat", parts, {"axis": 0})

    def size(self, dim: int | Dim) -> str:
        """One size as a vector of one element."""
        if isinstance(dim, int):
            return self.constant(torch.tensor([dim]))
        if dim not in self._dims:
            self._dims[dim] = self._symbol(dim) if dim.is_symbol else self._polynomial(dim)
        return self._dims[dim]

    def _polynomial(self, dim: Dim) -> str:
        total = ""
        for monomial, coefficient in dim.terms:
            factors = [self.size(Dim.symbol(name)) for name in monomial]
            if coefficient != 1 or not factors:
                factors.append(self.size(coefficient))
            term = factors[0]
            for factor in factors[1:]:
                term = self.emit(None, "Mul", (term, factor), {})
            total = self.emit(None, "Add", (total, term), {}) if total else term
        return total

    def _symbol(self, dim: Dim) -> str:
        """From an input that has this size; the verifier saw to it that there is one."""
        name, axis = next(
            (name, axis)
            for name, value in self.inputs.items()
            for axis, size in enumerate(value.shape)
            if size == dim
        )
        return self.emit(None, "Shape", (name,), {"start": axis, "end": axis + 1})

    # -- the whole

    def operators(self) -> Iterator[Any]:
        """The operators that the results need, in order."""
        wanted: dict[str, str] = {}
        # of several results the last one is read
        made = {proto.output[-1] for proto in self._operators}
        for output, node in self.results.items():
            name = self.names[node]
            if name in made and name not in wanted:
                wanted[name] = output
            else:  # an input, a parameter, or one value under two names
                self._append(None, "Identity", (wanted.get(name, name),), [output], {})
        needed = set(self.results)
        kept = []
        for proto in reversed(self._operators):
            proto.output[-1] = wanted.get(proto.output[-1], proto.output[-1])
            if proto.output[-1] in needed:
                for i, name in enumerate(proto.input):
                    proto.input[i] = wanted.get(name, name)
                needed.update(proto.input)
                kept.append(proto)
        self.stored = {name: t for name, t in self.stored.items() if name in needed}
        return reversed(kept)


def tensor_proto(onnx: Any, name: str, tensor: torch.Tensor) -> Any:
    """A TensorProto that holds its data."""
    proto = describe_tensor(onnx, name, tensor)
    proto.raw_data = bytes(raw_bytes(tensor))
    return proto


def describe_tensor(onnx: Any, name: str, tensor: torch.Tensor) -> Any:
    """A TensorProto without its data."""
    dtype = Value.of(tensor).dtype
    return onnx.TensorProto(name=name, data_type=TYPE_CODES[dtype], dims=list(tensor.shape))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in memory order, little-endian."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _only_multiplies(stored: fx.Node) -> bool:
    """Whether products read it as their weight, as it is or decoded, and nothing else does."""
    return bool(stored.users) and all(
        (is_call(user, "linear", "integer_linear") and user.args.index(stored) == 1)
        or (is_call(user, "dequantize") and user.args[0] is stored and _decodes_weights(user))
        for user in stored.users
    )


def _decodes_weights(node: fx.Node) -> bool:
    scale, group = node.args[1].meta["value"], node.kwargs.get("group")
    along = not scale.rank or node.kwargs.get("axis") is not None
    return along and group is None and _only_multiplies(node)


def _unique(name: str, used: set[str]) -> str:
    """``name``, or ``name_1``, ``name_2``, ... where that is used; it is from now on."""
    found, count = name, 0
    while found in used:
        count += 1
        found = f"{name}_{count}"
    used.add(found)
    return found
