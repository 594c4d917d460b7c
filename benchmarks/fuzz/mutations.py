"""Ways to damage an ONNX file, by accident or by malice."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Mutation = Callable[[random.Random, onnx.ModelProto, Path], None]
"""Changes the model in place; may put files beside it. The path is the model's folder; ``../outside`` has canaries."""
MUTATIONS: list[Mutation] = []

SIZES = (0, -1, -4, 1, 3, 7, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 62) + 1, -(1 << 62))
NAMES = (
    "",
    "x",
    "y",
    "../outside/secret.bin",
    "/etc/passwd",
    "a" * 5000,
    "\x00",
    "é\u202e",
    "__class__",
    "%s{}",
    "a/b/../c",
    "con",
    "main",
    "w",
    "batch",
    "1",
    "not a name",
    "-1",
)
METADATA = (
    "pkg.torch.onnx.name_scopes",
    "pkg.torch.onnx.stack_trace",
    "pkg.torch.onnx.class_hierarchy",
    "namespace",
    "tersor.dims",
    "tersor.op",
    "tersor.site",
    "tersor.module",
)
"""Notes of exporters, ours among them."""
TOLD = (
    "['",
    "[1, [2]]",
    "[" * 5000,
    "x" * 100_000,
    "['a', 'b']",
    "{}",
    '{"batch": [1, 1e99]}',
    '{"batch": [3, 2], "length": 5}',
    '{"batch": [1, 1000000000000000000000000000]}',
    '{"batch": [7, 7], "../x": [1, 2]}',
    "linear",
)
KINDS = (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 23, 99, -1)
"""Codes of element types, known and unknown ones."""


def mutation(function: Mutation) -> Mutation:
    """Enters a mutation into the table."""
    MUTATIONS.append(function)
    return function


def mutate(rng: random.Random, model: onnx.ModelProto, folder: Path) -> bytes:
    """The contents of a damaged file; data files and links are put into its folder."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(MUTATIONS)(rng, model, folder)
    data = model.SerializeToString()
    return _damage_bytes(rng, data) if rng.random() < 0.25 else data


def _damage_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not changed:
            break
        at = rng.randrange(len(changed))
        kind = rng.choice(("flip", "set", "cut", "insert", "repeat", "varint", "swap"))
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == "cut":
            del changed[at : at + rng.choice((1, 4, 100, len(changed)))]
        elif kind == "insert":
            changed[at:at] = rng.randbytes(rng.choice((1, 3, 50)))
        elif kind == "repeat":
            changed[at:at] = changed[at : at + rng.choice((2, 30, 500))]
        elif kind == "varint":
            changed[at : at + 1] = b"\xff" * 9 + b"\x01"
        else:
            changed[at : at + 8] = changed[at : at + 8][::-1]
    return bytes(changed)


# -- what there is in a model


def _nodes(rng: random.Random, model: onnx.ModelProto) -> Any:
    """The nodes of the graph, or of a function."""
    lists = [model.graph.node, *(f.node for f in model.functions)]
    return rng.choice([found for found in lists if len(found)] or [model.graph.node])


def _node(rng: random.Random, model: onnx.ModelProto) -> Any:
    nodes = _nodes(rng, model)
    return rng.choice(nodes) if len(nodes) else nodes.add()


def _tensor(rng: random.Random, model: onnx.ModelProto) -> Any:
    found = [
        *model.graph.initializer,
        *(a.t for n in model.graph.node for a in n.attribute if a.type == AttributeProto.TENSOR),
    ]
    return rng.choice(found) if found else model.graph.initializer.add(name="w", data_type=1)


def _values(model: onnx.ModelProto) -> list[str]:
    return [
        *(i.name for i in model.graph.input),
        *(t.name for t in model.graph.initializer),
        *(o for n in model.graph.node for o in n.output),
    ]


# -- mutations


@mutation
def sizes_of_a_tensor(rng, model, folder):
    dims = _tensor(rng, model).dims
    if len(dims) and rng.random() < 0.7:
        dims[rng.randrange(len(dims))] = rng.choice(SIZES)
    else:
        dims.extend([rng.choice(SIZES) for _ in range(rng.choice((1, 2, 20)))])


@mutation
def sizes_of_an_input(rng, model, folder):
    values = [*model.graph.input, *model.graph.output]
    shape = (
        rng.choice(values).type.tensor_type.shape
        if values
        else model.graph.input.add().type.tensor_type.shape
    )
    dim = rng.choice(shape.dim) if len(shape.dim) and rng.random() < 0.8 else shape.dim.add()
    if rng.random() < 0.6:
        dim.dim_value = rng.choice(SIZES)
    else:
        dim.dim_param = rng.choice((*NAMES, "batch*2", "batch + 1", "length", "a" * 300))


@mutation
def name_of_something(rng, model, folder):
    name = rng.choice((*NAMES, *_values(model)))
    node = _node(rng, model)
    where = rng.choice(
        ("input", "output", "initializer", "graph input", "graph output", "node", "op", "domain", "function")
    )
    if where == "input" and len(node.input):
        node.input[rng.randrange(len(node.input))] = name
    elif where == "output" and len(node.output):
        node.output[rng.randrange(len(node.output))] = name
    elif where == "initializer":
        _tensor(rng, model).name = name
    elif where == "graph input" and len(model.graph.input):
        rng.choice(model.graph.input).name = name
    elif where == "graph output" and len(model.graph.output):
        rng.choice(model.graph.output).name = name
    elif where == "node":
        node.name = name
    elif where == "domain":
        node.domain = rng.choice((name, "com.microsoft", "ai.onnx", "ai.onnx.ml"))
    elif where == "function" and len(model.functions):
        rng.choice(model.functions).name = name
    else:
        node.op_type = rng.choice((name, *sorted({s.name for s in onnx.defs.get_all_schemas()})))


@mutation
def other_operand(rng, model, folder):
    """Wrong types, cycles, operands from later."""
    node = _node(rng, model)
    if len(node.input) and rng.random() < 0.8:
        node.input[rng.randrange(len(node.input))] = rng.choice(_values(model))
    elif len(node.input) and rng.random() < 0.5:
        node.input.pop()
    else:
        node.input.append(rng.choice(("", *_values(model))))


@mutation
def cycle(rng, model, folder):
    node = _node(rng, model)
    if len(node.input) and len(node.output):
        node.input[0] = node.output[-1]


def _repeated_field(rng, model):
    """One of a model's lists."""
    return rng.choice(
        (
            model.graph.node,
            model.graph.initializer,
            model.graph.input,
            model.graph.output,
            model.opset_import,
            model.functions,
            _node(rng, model).attribute,
        )
    )


@mutation
def copies(rng, model, folder):
    """Two of what there is one of."""
    field = _repeated_field(rng, model)
    if len(field):
        field.append(rng.choice(field))


@mutation
def losses(rng, model, folder):
    field = _repeated_field(rng, model)
    if len(field):
        del field[rng.randrange(len(field))]


@mutation
def order(rng, model, folder):
    nodes = _nodes(rng, model)
    shuffled = list(nodes)
    rng.shuffle(shuffled)
    copied = [onnx.NodeProto.FromString(n.SerializeToString()) for n in shuffled]
    del nodes[:]
    nodes.extend(copied)


@mutation
def element_type(rng, model, folder):
    if rng.random() < 0.6 or not len(model.graph.input):
        _tensor(rng, model).data_type = rng.choice(KINDS)
    else:
        rng.choice(model.graph.input).type.tensor_type.elem_type = rng.choice(KINDS)


@mutation
def kind_of_input(rng, model, folder):
    made = rng.choice(model.graph.input) if len(model.graph.input) else model.graph.input.add(name="x")
    kind = rng.choice(("sequence", "optional", "none", "no shape", "string", "sparse"))
    if kind == "sequence":
        made.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == "optional":
        made.type.optional_type.elem_type.tensor_type.elem_type = 1
    elif kind == "sparse":
        made.type.sparse_tensor_type.elem_type = 1
    elif kind == "string":
        made.type.tensor_type.elem_type = TensorProto.STRING
    elif kind == "no shape":
        made.type.tensor_type.ClearField("shape")
    else:
        made.ClearField("type")


@mutation
def contents(rng, model, folder):
    """Not numbers, too much, too little, in another field, twice."""
    tensor = _tensor(rng, model)
    kind = rng.choice(("nan", "inf", "short", "long", "field", "both", "none", "strings", "segment"))
    if kind in ("nan", "inf") and tensor.data_type == TensorProto.FLOAT and tensor.raw_data:
        array = (
            numpy_helper.to_array(tensor).copy()
            if np.prod(tensor.dims) * 4 == len(tensor.raw_data)
            else np.zeros(1, np.float32)
        )
        if array.size:
            array.reshape(-1)[rng.randrange(array.size)] = float(kind)
        tensor.raw_data = array.tobytes()
    elif kind == "short":
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == "long":
        tensor.raw_data += b"\0" * rng.choice((1, 4, 4096))
    elif kind == "field":
        tensor.ClearField("raw_data")
        tensor.float_data.extend([rng.uniform(-1, 1) for _ in range(rng.choice((1, 4, 24)))])
    elif kind == "both":
        tensor.int64_data.extend([1 << 62, -1])
        tensor.int32_data.extend([70000, -1])
    elif kind == "none":
        tensor.ClearField("raw_data")
    elif kind == "strings":
        tensor.string_data.append(b"\xff\xfe")
    elif kind == "segment":
        tensor.segment.begin, tensor.segment.end = 1, 1 << 40


@mutation
def number_in_a_constant(rng, model, folder):
    """Huge or negative shapes, axes, positions, repeats."""
    whole = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64 and len(t.raw_data) >= 8]
    if not whole:
        return
    tensor = rng.choice(whole)
    array = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 8 * 8], np.int64).copy()
    array[rng.randrange(array.size)] = rng.choice(SIZES)
    tensor.raw_data = array.tobytes()


@mutation
def attribute(rng, model, folder):
    node = _node(rng, model)
    made = rng.choice(node.attribute) if len(node.attribute) and rng.random() < 0.7 else node.attribute.add()
    made.name = made.name or rng.choice(
        ("axis", "axes", "perm", "to", "value", "keepdims", "epsilon", "group", "strides", "equation")
    )
    kind = rng.choice(("i", "ints", "f", "s", "t", "type", "reference", "graph", "name"))
    if kind == "i":
        made.i, made.type = rng.choice((*SIZES, 2, 5)), AttributeProto.INT
    elif kind == "ints":
        made.ints.extend([rng.choice(SIZES) for _ in range(rng.choice((1, 2, 9)))])
        made.type = AttributeProto.INTS
    elif kind == "f":
        made.f, made.type = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38)), AttributeProto.FLOAT
    elif kind == "s":
        made.s, made.type = (
            rng.choice((b"", b"\xff\xfe", b"reflect", b"i" * 300, b"ij,jk->", b"...,...->...")),
            AttributeProto.STRING,
        )
    elif kind == "t":
        made.type = AttributeProto.TENSOR
        made.t.data_type, made.t.raw_data = rng.choice(KINDS), b"\0" * rng.choice((0, 4, 4096))
        made.t.dims.extend([rng.choice(SIZES) for _ in range(rng.choice((0, 1, 2)))])
    elif kind == "type":
        made.type = rng.randrange(15)
    elif kind == "reference":
        made.ref_attr_name = rng.choice(("axis", "nowhere", made.name))
    elif kind == "graph":
        made.type = AttributeProto.GRAPH
        made.g.ParseFromString(model.graph.SerializeToString())
    else:
        made.name = rng.choice(NAMES)


@mutation
def opset(rng, model, folder):
    made = rng.choice(model.opset_import) if len(model.opset_import) else model.opset_import.add()
    if rng.random() < 0.8:
        made.version = rng.choice((0, -1, 1, 6, 9, 10, 11, 12, 13, 15, 18, 20, 21, 22, 23, 24, 99, 1 << 40))
    else:
        made.domain = rng.choice(NAMES)


@mutation
def external_data(rng, model, folder):
    """Data elsewhere: beside the model as it should be, outside, behind links, in devices, beyond the end."""
    tensor = _tensor(rng, model)
    data = tensor.raw_data or b"\0" * 64
    (folder / "data.bin").write_bytes(b"\0" * 16 + data + b"\0" * 16)
    outside = folder.parent / "outside"
    links = {
        "link.bin": outside / "secret.bin",
        "linked": outside,
        "zero.bin": Path("/dev/zero"),
        "loop.bin": folder / "loop.bin",
    }
    for name, target in links.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    if not (folder / "pipe.bin").exists():
        os.mkfifo(folder / "pipe.bin")
    location = rng.choice(
        (
            "data.bin",
            "data.bin",
            "data.bin",
            "./data.bin",
            "../outside/secret.bin",
            str(outside / "secret.bin"),
            "link.bin",
            "linked/secret.bin",
            "zero.bin",
            "loop.bin",
            "pipe.bin",
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            "/proc/self/environ",
            "/etc/passwd",
            "",
            ".",
            "..",
            "linked",
            "missing.bin",
            "model.onnx",
            "data.bin\0.txt",
            "a" * 5000,
            "x/../data.bin",
            "../model/data.bin",
            "linked/../outside/secret.bin",
            "file:///etc/passwd",
            "~/.bashrc",
            "data.bin/",
        )
    )
    size = len(data)
    offset = rng.choice((16, 16, 16, 0, size + 16, size + 32, -1, 1 << 40, 1 << 63, 1 << 70))
    length = rng.choice((size, size, size, 0, -1, size + 1, size * 4, 1 << 40, 1 << 70))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length), ("checksum", "0")):
        if rng.random() < 0.92:
            text = (
                str(value)
                if rng.random() < 0.95
                else rng.choice(("abc", "", "1e3", "0x10", "\u0664", "1_6", " 16 "))
            )
            tensor.external_data.add(key=key, value=text)
    if rng.random() < 0.1:
        tensor.external_data.add(key="location", value="../outside/secret.bin")


@mutation
def nested(rng, model, folder):
    """Branches inside branches, deeper than anyone writes."""
    depth = rng.choice((3, 10, 25, 30))  # protobuf itself refuses more than 33
    inner = helper.make_graph(
        [helper.make_node("Identity", ["deep_x"], ["deep_y"])],
        "inner",
        [],
        [helper.make_empty_tensor_value_info("deep_y")],
    )
    for level in range(depth):
        branch = (
            helper.make_node("If", ["deep_c"], [f"deep_{level}"], then_branch=inner, else_branch=inner)
            if level < 4
            else helper.make_node("If", ["deep_c"], [f"deep_{level}"], then_branch=inner)
        )
        inner = helper.make_graph(
            [branch], f"level_{level}", [], [helper.make_empty_tensor_value_info(f"deep_{level}")]
        )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "deep_c"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1.0]), "deep_x"))
    model.graph.node.append(
        helper.make_node("If", ["deep_c"], ["deep"], then_branch=inner, else_branch=inner)
    )
    model.graph.output.append(helper.make_empty_tensor_value_info("deep"))


@mutation
def functions_in_functions(rng, model, folder):
    """A function that calls itself, two that call each other, and a few that call the next one twice each."""
    depth, calls = rng.choice(((1, 1), (2, 1), (5, 2), (30, 1), (49, 2), (30, 3), (60, 1)))
    circular = rng.random() < 0.3
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("bomb", 1)]
    for level in range(depth):
        if level + 1 < depth or circular:
            following = f"F{(level + 1) % depth}"
            names = [f"t{i}" for i in range(calls)]
            body = [helper.make_node(following, ["a"], [n], domain="bomb") for n in names]
        else:
            names = ["t"]
            body = [helper.make_node("Relu", ["a"], ["t"])]
        body.append(helper.make_node("Sum", names, ["b"]))
        model.functions.append(helper.make_function("bomb", f"F{level}", ["a"], ["b"], body, opsets, []))
    model.opset_import.append(helper.make_opsetid("bomb", 1))
    start = rng.choice(_values(model) or ["x"])
    model.graph.node.append(helper.make_node("F0", [start], ["burst"], domain="bomb"))
    model.graph.output.append(helper.make_empty_tensor_value_info("burst"))


@mutation
def growth(rng, model, folder):
    """Few operators whose result is huge: doubled again and again, filled, counted, spread."""
    source = rng.choice([i.name for i in model.graph.input] or ["x"])
    kind = rng.choice(
        (
            "concat",
            "square of sizes",
            "fill",
            "range",
            "tile",
            "expand",
            "one hot",
            "pad",
            "split",
            "outer",
            "sum of sizes",
        )
    )
    nodes, tensors = [], {}
    big = rng.choice((1 << 20, 1 << 31, 1 << 40, 1 << 62))
    if kind == "concat":
        last = source
        for i in range(rng.choice((4, 30, 64))):
            nodes.append(helper.make_node("Concat", [last, last], [f"grown_{i}"], axis=-1))
            last = f"grown_{i}"
        nodes.append(helper.make_node("Identity", [last], ["grown"]))
    elif kind in ("square of sizes", "sum of sizes"):
        nodes.append(helper.make_node("Shape", [source], ["grown_s"]))
        nodes.append(helper.make_node("ReduceSum", ["grown_s"], ["size_0"], keepdims=1))
        count = rng.choice((3, 12, 40))
        for i in range(count):
            op = "Mul" if kind.startswith("square") else "Add"
            nodes.append(helper.make_node(op, [f"size_{i}", f"size_{i}"], [f"size_{i + 1}"]))
        nodes.append(helper.make_node("ConstantOfShape", [f"size_{count}"], ["grown"]))
    elif kind == "fill":
        tensors["grown_n"] = np.array([big, big] if rng.random() < 0.5 else [1 << 14, 1 << 14])
        nodes.append(helper.make_node("ConstantOfShape", ["grown_n"], ["grown_c"]))
        nodes.append(
            helper.make_node(
                rng.choice(("Exp", "NonZero", "Shape", "CumSum", "Softmax")), ["grown_c"], ["grown"]
            )
        )
    elif kind == "range":
        whole = rng.random() < 0.5
        tensors.update(
            {
                "r0": np.array(0 if whole else 0.5),
                "r1": np.array(big if whole else float(big)),
                "r2": np.array(1 if whole else 0.5),
            }
        )
        nodes.append(helper.make_node("Range", ["r0", "r1", "r2"], ["grown"]))
    elif kind in ("tile", "expand"):
        tensors["grown_n"] = np.array([big, big] if rng.random() < 0.5 else [big])
        tensors["grown_w"] = np.ones((1, 1), np.float32)
        start = rng.choice((source, "grown_w"))
        nodes.append(helper.make_node(kind.capitalize(), [start, "grown_n"], ["grown"]))
    elif kind == "one hot":
        tensors.update({"grown_i": np.array([1, 2]), "grown_d": np.array(big), "grown_v": np.float32([0, 1])})
        nodes.append(helper.make_node("OneHot", ["grown_i", "grown_d", "grown_v"], ["grown"]))
    elif kind == "pad":
        tensors["grown_p"] = np.array([0, big, 0, big])
        nodes.append(helper.make_node("Pad", [source, "grown_p"], ["grown"]))
    elif kind == "split":
        tensors["grown_w"] = np.ones((4, 4), np.float32)
        nodes.append(
            helper.make_node("Split", [rng.choice((source, "grown_w"))], ["grown"], axis=0, num_outputs=big)
        )
    else:
        tensors.update(
            {"grown_a": np.ones((1 << 15, 1), np.float32), "grown_b": np.ones((1, 1 << 15), np.float32)}
        )
        nodes.append(
            helper.make_node(rng.choice(("Add", "MatMul", "Equal")), ["grown_a", "grown_b"], ["grown_c"])
        )
        nodes.append(
            helper.make_node("ReduceSum", ["grown_c"], ["grown"])
            if rng.random() < 0.5
            else helper.make_node("Identity", ["grown_c"], ["grown"])
        )
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()])
    model.graph.output.append(helper.make_empty_tensor_value_info("grown"))


@mutation
def long_chain(rng, model, folder):
    """More operators in a row than a recursive algorithm survives."""
    last = rng.choice(_values(model) or ["x"])
    op = rng.choice(("Relu", "Identity", "Neg", "Abs", "Transpose"))
    for i in range(rng.choice((50, 1500, 3000))):
        model.graph.node.append(helper.make_node(op, [last], [f"chain_{i}"]))
        last = f"chain_{i}"
    model.graph.output.append(helper.make_empty_tensor_value_info(last))


@mutation
def unusual_fields(rng, model, folder):
    kind = rng.choice(("sparse", "metadata", "annotation", "training", "doc", "graph", "ir", "defaults"))
    if kind == "sparse":
        model.graph.sparse_initializer.add().dims.extend([1 << 40])
    elif kind == "metadata":
        holder = rng.choice((model, _node(rng, model)))
        holder.metadata_props.add(key=rng.choice(METADATA), value=rng.choice(TOLD))
    elif kind == "annotation":
        model.graph.quantization_annotation.add(tensor_name="w")
    elif kind == "training":
        model.training_info.add().algorithm.ParseFromString(model.graph.SerializeToString())
    elif kind == "doc":
        model.doc_string = "x" * 1_000_000
    elif kind == "graph":
        model.ClearField("graph")
    elif kind == "ir":
        model.ir_version = rng.choice((0, -1, 1, 3, 99, 1 << 40))
    elif len(model.functions):
        rng.choice(model.functions).attribute_proto.add(name="axis", type=AttributeProto.INT, i=1 << 40)


@mutation
def nothing_but_bytes(rng, model, folder):
    """Leaves the model to the damage of its bytes."""
