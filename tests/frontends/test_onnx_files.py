"""Files as they come: other exporters, branches, functions, external data, damage and malice."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tersor import frontends  # noqa: E402
from tersor.errors import CaptureError, InputError, TersorError, UnsupportedOpError  # noqa: E402
from tersor.ir import Range  # noqa: E402

WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def node(op, inputs, outputs, name="", **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


def floats(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(nodes, tensors=(), inputs=None, outputs="y", opset=17, **more):
    graph = helper.make_graph(
        nodes,
        "test",
        inputs if inputs is not None else [floats("x", "batch", 4)],
        [helper.make_empty_tensor_value_info(n) for n in outputs.split()],
        [numpy_helper.from_array(value, name) for name, value in dict(tensors).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **more)


def product(**more):
    return model([node("MatMul", "x w", "y", name="/dense/MatMul")], {"w": WEIGHT}, **more)


def test_path_and_proto_give_the_same(tmp_path):
    path = tmp_path / "dense.onnx"
    onnx.save(product(), path)
    program = frontends.capture(path)
    assert program.digest() == frontends.capture(product()).digest() == frontends.capture(str(path)).digest()
    x = torch.randn(5, 4)
    torch.testing.assert_close(program(x=x)["y"], x @ torch.from_numpy(WEIGHT))
    assert [n.meta["site"] for n in program.main.calls("linear")] == ["dense"]


def test_names_without_paths_are_kept():
    program = frontends.capture(model([node("MatMul", "x my_weight", "y", name="n1")], {"my_weight": WEIGHT}))
    assert list(program.parameters) == ["my_weight"]


def test_shapes_over_named_dimensions():
    """The tower that exporters make of x.view(x.shape[0], 2, -1)."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "b", axis=0),
        node("Unsqueeze", "b axis", "b1"),
        node("Concat", "b1 rest", "shape", axis=0),
        node("Reshape", "x shape", "y"),
    ]
    tensors = {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([2, -1])}
    program = frontends.capture(model(nodes, tensors))
    assert [n.target.name for n in program.main.calls()] == ["reshape"]
    assert str(program.main.results[0].meta["value"]) == "float32[batch, 2, 2]"


def branch(value):
    constant = helper.make_node("Constant", [], ["c"], value_float=value)
    body = [constant, node("Mul", "x c", "out")]
    return helper.make_graph(body, f"times_{value}", [], [helper.make_empty_tensor_value_info("out")])


def test_branch_that_is_decided():
    nodes = [
        node("Shape", "x", "s", start=1),
        node("Squeeze", "s", "width"),
        node("Equal", "width four", "is_four"),
        node("If", "is_four", "y", then_branch=branch(2.0), else_branch=branch(3.0)),
    ]
    program = frontends.capture(model(nodes, {"four": np.array(4)}))
    assert float(program(x=torch.ones(1, 4))["y"].max()) == 2.0


def test_branch_that_depends_on_values():
    nodes = [
        node("ReduceMax", "x", "m", keepdims=0),
        node("Greater", "m zero", "positive"),
        node("If", "positive", "y", name="choose", then_branch=branch(2.0), else_branch=branch(3.0)),
    ]
    with pytest.raises(CaptureError, match="depends on the values") as caught:
        frontends.capture(model(nodes, {"zero": np.float32(0)}))
    assert "choose" in caught.value.where


def test_functions_of_the_file():
    body = [
        helper.make_node("Constant", [], ["c"]),
        node("Mul", "a c", "b"),
    ]
    reference = onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="by")
    body[0].attribute.append(reference)
    opset = [helper.make_opsetid("", 17)]
    scale = helper.make_function("mine", "Scale", ["a"], ["b"], body, opset, ["by"])
    made = model([node("Scale", "x", "y", domain="mine", by=2.5)], functions=[scale])
    made.opset_import.append(helper.make_opsetid("mine", 1))
    assert float(frontends.capture(made)(x=torch.ones(1, 4))["y"].max()) == 2.5


def test_function_that_calls_itself():
    again = helper.make_function(
        "mine",
        "Again",
        ["a"],
        ["b"],
        [node("Again", "a", "b", domain="mine")],
        [helper.make_opsetid("mine", 1)],
        [],
    )
    made = model([node("Again", "x", "y", domain="mine")], functions=[again])
    made.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(CaptureError, match="without end"):
        frontends.capture(made)


@pytest.mark.parametrize("scopes", ["{}", "['", "[" * 5000, "[1, [2], 3]", "['', 'dense']"])
def test_scopes_that_are_no_list_of_names_say_nothing(scopes):
    made = product()
    made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert len(frontends.capture(made).main.calls("linear")) == 1


def test_a_branch_on_no_number():
    nodes = [node("If", "none", "y", then_branch=branch(2.0), else_branch=branch(3.0))]
    with pytest.raises(InputError, match="one number"):
        frontends.capture(model(nodes, {"none": np.zeros(0, bool)}))


def test_codes_are_read_as_they_are_and_decoded():
    """One stored tensor is two values: both outputs come from it, with different types."""
    nodes = [node("Identity", "codes", "plain"), node("DequantizeLinear", "codes scale", "decoded")]
    tensors = {"codes": np.array([1, 2, 200], np.uint8), "scale": np.float32(0.5)}
    results = frontends.capture(model(nodes, tensors, outputs="decoded plain"))(x=torch.ones(1, 4))
    assert results["plain"].tolist() == [1, 2, 200] and results["plain"].dtype == torch.uint8
    assert results["decoded"].tolist() == [0.5, 1.0, 100.0]


def test_functions_that_multiply_are_refused_at_once():
    """Thirty functions, each of which calls the next one twice: a thousand million operators."""
    opsets = [helper.make_opsetid("mine", 1), helper.make_opsetid("", 17)]
    functions = [
        helper.make_function(
            "mine", f"F{i}", ["a"], ["c"],
            [node(f"F{i + 1}", "a", "b", domain="mine"), node(f"F{i + 1}", "b", "c", domain="mine")], opsets, [],
        )
        for i in range(30)
    ]  # fmt: skip
    functions.append(helper.make_function("mine", "F30", ["a"], ["c"], [node("Relu", "a", "c")], opsets, []))
    made = model([node("F0", "x", "y", domain="mine")], functions=functions)
    made.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(CaptureError, match="operators once its functions"):
        frontends.capture(made)


def test_sizes_multiplied_again_and_again_are_refused():
    nodes = [node("Shape", "x", "s"), node("ReduceSum", "s", "n0", keepdims=1)]
    nodes += [node("Mul", f"n{i} n{i}", f"n{i + 1}") for i in range(40)]
    nodes.append(node("ConstantOfShape", "n40", "y"))
    with pytest.raises(CaptureError, match="a size"):
        frontends.capture(model(nodes))


def test_axes_that_go_only_at_some_sizes_are_refused():
    with pytest.raises(CaptureError, match="removes every axis of size 1") as caught:
        frontends.capture(model([node("Squeeze", "x", "y")]))
    assert "batch" in caught.value.why
    program = frontends.capture(model([node("Squeeze", "x", "y")]), dynamic={"x": {0: ("batch", 2, 8)}})
    assert str(program.main.results[0].meta["value"]) == "float32[batch, 4]"


def test_a_size_that_the_exporter_fixed_is_to_be_fixed_by_the_user():
    nodes, tensors = [node("Reshape", "x shape", "y")], {"shape": np.array([3, 4])}
    with pytest.raises(CaptureError, match="cannot reshape") as caught:
        frontends.capture(model(nodes, tensors))
    assert "(batch)" in caught.value.fix and "dynamic=" in caught.value.fix
    program = frontends.capture(model(nodes, tensors), dynamic={"x": {0: ("batch", 3, 3)}})
    assert program(x=torch.ones(3, 4))["y"].shape == (3, 4)


def test_constants_that_cannot_be_computed():
    tensors = {"table": np.zeros((2, 2), np.int64), "at": np.array([5, 0])}
    with pytest.raises(InputError, match=r"outside of a tensor\n.*where: /look/Gather"):
        frontends.capture(model([node("Gather", "table at", "y", name="/look/Gather")], tensors))


def test_unsupported_operators_are_listed_together():
    nodes = [
        node("LSTM", "x w w", "a", name="first", hidden_size=3),
        node("Fold", "a", "b", name="second", domain="their.domain"),
        node("Fold", "b", "y", name="third", domain="their.domain"),
        node("Scan", "x", "unused", name="dead"),
    ]
    with pytest.raises(UnsupportedOpError) as caught:
        frontends.capture(model(nodes, {"w": WEIGHT}))
    text = str(caught.value)
    assert "no converter: 2" in text and "their.domain.Fold, 2 times (second, third)" in text
    assert "LSTM, 1 time (first): recurrent" in text and "Scan" not in text


def test_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(
        product(),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
        convert_attribute=False,
    )
    assert (tmp_path / "weights.bin").is_file()
    x = torch.randn(2, 4)
    torch.testing.assert_close(frontends.capture(path)(x=x)["y"], x @ torch.from_numpy(WEIGHT))
    with pytest.raises(InputError, match="another file"):
        frontends.capture(onnx.load(path, load_external_data=False))
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="bytes"):
        frontends.capture(path)


PLACES = [
    "../secret.bin",
    "/etc/hostname",
    "link.bin",
    "",
    "missing.bin",
    "zero\0.bin",
    "a" * 5000,
    "circle.bin",
]


@pytest.mark.parametrize("location", PLACES)
def test_external_data_stays_in_the_folder(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "circle.bin").symlink_to(folder / "circle.bin")
    made = product()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="said to be in|missing") as caught:
        frontends.capture(folder / "model.onnx")
    assert "'w'" in caught.value.where


def damaged(change):
    made = product()
    change(made)
    return made


DAMAGE = {
    "no data": lambda m: m.graph.initializer[0].ClearField("raw_data"),
    "too little data": lambda m: setattr(m.graph.initializer[0], "raw_data", b"123"),
    "huge shape": lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 60),
    "negative shape": lambda m: m.graph.initializer[0].dims.__setitem__(0, -4),
    "strings": lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING),
    "unknown type": lambda m: setattr(m.graph.initializer[0], "data_type", 99),
    "missing value": lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"),
    "missing operand": lambda m: m.graph.node[0].input.pop(),
    "circle": lambda m: m.graph.node[0].input.__setitem__(0, "y"),
    "made twice": lambda m: m.graph.node.append(m.graph.node[0]),
    "no outputs": lambda m: m.graph.output.pop(),
    "unknown output": lambda m: setattr(m.graph.output[0], "name", "nowhere"),
    "no opset": lambda m: m.opset_import.pop(),
    "old opset": lambda m: setattr(m.opset_import[0], "version", 6),
    "future opset": lambda m: setattr(m.opset_import[0], "version", 99),
    "input without a shape": lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"),
    "input that is no tensor": lambda m: m.graph.input[0].type.ClearField("tensor_type"),
    "not a number": lambda m: setattr(
        m.graph.initializer[0], "raw_data", np.full((4, 3), np.nan, np.float32).tobytes()
    ),
    "wrong attribute": lambda m: (
        setattr(m.graph.node[0], "op_type", "Transpose"),
        m.graph.node[0].attribute.append(helper.make_attribute("perm", [0, 7])),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_typed_error(kind):
    with pytest.raises((InputError, CaptureError)):
        frontends.capture(damaged(DAMAGE[kind]))


def test_bytes_that_are_no_model(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"PK\x03\x04 this is not a model")
    with pytest.raises(InputError, match="damaged"):
        frontends.capture(path)
    with pytest.raises(InputError, match="no file"):
        frontends.capture(tmp_path / "missing.onnx")


def test_mutated_files_end_in_a_program_or_a_typed_error(tmp_path):
    nodes = [
        node("MatMul", "x w", "a", name="/dense/MatMul"),
        node("Reshape", "a shape", "b"),
        node("Slice", "b start end axes", "c"),
        node("Softmax", "c", "y", axis=-1),
    ]
    tensors = {"w": WEIGHT, "shape": np.array([0, 3]), "start": np.array([0]), "end": np.array([2]),
               "axes": np.array([1])}  # fmt: skip
    whole = model(nodes, tensors).SerializeToString()
    generator, path, outcomes = random.Random(0), tmp_path / "mutated.onnx", set()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data[: generator.choice([len(data), generator.randrange(len(data))])])
        try:
            frontends.capture(path)
            outcomes.add("program")
        except TersorError:
            outcomes.add("refused")
    assert outcomes == {"program", "refused"}


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install") as caught:
        frontends.capture("model.onnx")
    assert "tersor[onnx]" in caught.value.fix


@pytest.mark.parametrize(("position", "least"), [(0, 1), (2, 3), (-1, 1), (-3, 3)])
def test_assumed_ranges_start_where_all_that_is_read_is_there(position, least):
    nodes = [node("Gather", "x at", "y", axis=1)]
    made = model(nodes, {"at": np.array(position)}, [floats("x", "batch", "length", 4)])
    program, x = frontends.capture(made), torch.randn(2, 5, 4)
    assert program.main.dims["length"] == Range(least, 512)
    assert torch.equal(program(x=x)["y"], x[:, position])
    if least > 1:
        with pytest.raises(CaptureError, match="narrow the range of length"):
            frontends.capture(made, dynamic={"x": {1: ("length", 1, 8)}})


def test_a_position_that_no_size_has_is_refused():
    made = model([node("Gather", "x at", "y")], {"at": np.array(9)})
    with pytest.raises(CaptureError, match="Gather.* reads what is not there"):
        frontends.capture(made)


def test_a_file_in_fp16_is_a_program_in_float32():
    """Exact numbers are few: what onnxruntime rounds to fp16 on the way is as far from them."""
    weight = WEIGHT.astype(np.float16)
    tensors = {"w": weight, "zero": np.float16(0), "least": np.float16(-65504)}
    nodes = [
        node("MatMul", "x w", "a"),
        node("Less", "a zero", "hidden"),
        node("Where", "hidden least a", "b"),
        node("Softmax", "b", "y", axis=-1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, (2, 4))
    program = frontends.capture(model(nodes, tensors, [x]))
    assert {n.meta["value"].dtype for _, n in program.nodes() if n.op != "output"} <= {"float32", "bool"}
    given = torch.randn(2, 4)
    product = given @ torch.from_numpy(weight).float()
    expected = torch.where(product < 0, -65504.0, product).softmax(-1)
    torch.testing.assert_close(program(x=given)["y"], expected)
