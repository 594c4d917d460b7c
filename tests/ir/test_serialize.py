"""Programs on disk: an exact round trip, and a clear refusal of anything else."""

from __future__ import annotations

import json
import os
import resource
import struct
from contextlib import contextmanager

import pytest
import small_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.errors import ProgramError
from tersor.ir import Dim, Program, Range, Value, load_program, ops, register_op, save_program
from tersor.ir.value import DTYPES


@pytest.fixture
def saved(tmp_path):
    """A saved model, its JSON, and a way to write that back changed."""

    class Saved:
        folder = tmp_path / "model"

        def __init__(self):
            save_program(small_models.bert(1), self.folder)
            self.data = json.loads((self.folder / "program.json").read_text())
            self.nodes = self.data["functions"][0]["nodes"]

        def node(self, op):
            return next(n for n in self.nodes if n.get("op") == op)

        def write(self):
            (self.folder / "program.json").write_text(json.dumps(self.data))

    return Saved()


@pytest.mark.parametrize("name", small_models.ALL)
def test_round_trip(name, tmp_path):
    program = small_models.ALL[name]()
    program.main.example = {dim: limits.min for dim, limits in program.main.dims.items()}
    for node in program.main.calls("linear"):
        node.meta.update(module="a.b", source="model.py:3", made_by="pass")
    save_program(program, tmp_path / "model")
    again = load_program(tmp_path / "model")
    assert again.digest() == program.digest()
    assert str(again) == str(program)
    assert [n.meta for n in again.main.calls()] == [n.meta for n in program.main.calls()]
    assert again.main.dims == program.main.dims and again.main.example == program.main.example
    assert list(again.parameters) == list(program.parameters)
    assert os.listdir(tmp_path) == ["model"]


ATTRIBUTES = [0, 1, 1.0, -0.0, 1e-300, 0.1, float("inf"), float("-inf"), 1 << 62, True, False]


@pytest.mark.parametrize("value", ATTRIBUTES, ids=repr)
def test_numbers_come_back_exactly(value, tmp_path):
    program = Program()
    function = program.add_function("main")
    function.set_outputs({"y": function.builder().full(shape=(2,), value=value, dtype="float32")})
    save_program(program, tmp_path / "model")
    (node,) = load_program(tmp_path / "model").main.calls()
    assert repr(node.kwargs["value"]) == repr(value) and type(node.kwargs["value"]) is type(value)
    assert node.kwargs["shape"] == (2,) and type(node.kwargs["shape"]) is tuple


def test_nan_comes_back(tmp_path):
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (2,)))
    function.set_outputs({"y": function.builder().add(x, float("nan"))})
    save_program(program, tmp_path / "model")
    value = load_program(tmp_path / "model").main.calls("add")[0].args[1]
    assert value != value


def test_dimensions_operands_and_several_functions_come_back(tmp_path):
    program, (n, m) = Program(), (Dim.symbol("n"), Dim.symbol("m"))
    for name in ("encode", "decode"):
        function = program.add_function(name, {"n": Range(1, 9), "m": Range(2, 1 << 40)})
        x = function.add_input("x.y", Value("float32", (n, m, 4)))
        build = function.builder()
        parts = build.concat((x, build.slice(x, dim=1, start=m - 1, end=m)), dim=1)
        function.set_outputs({"a.b": build.reshape(parts, shape=(n * m + n, 4)), "x": x})
    save_program(program, tmp_path / "model")
    again = load_program(tmp_path / "model")
    assert again.digest() == program.digest() and str(again) == str(program)
    node = again.functions["decode"].calls("reshape")[0]
    assert node.kwargs["shape"] == (n * m + n, 4) and again.functions["decode"].outputs == ("a.b", "x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_every_type_and_form_come_back(dtype, tmp_path):
    program = Program()
    function = program.add_function("main")
    build = function.builder()
    base = torch.arange(12).reshape(3, 4).to(DTYPES[dtype])
    tensors = {
        "matrix": base,
        "transposed": base.T,
        "part": base[1:],
        "number": base[0, 1],
        "empty": base[:0],
    }
    function.set_outputs({name: build.parameter(name, tensor) for name, tensor in tensors.items()})
    save_program(program, tmp_path / "model")
    again = load_program(tmp_path / "model")
    assert again.digest() == program.digest()
    for name, tensor in tensors.items():
        assert torch.equal(again.parameters[name].tensor, tensor)


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path):
    program, tensor = Program(), torch.randn(100, 100)
    function = program.add_function("main")
    build = function.builder()
    results = {name: build.parameter(name, tensor) for name in ("first", "second")}
    program.parameters["third"] = program.parameters["first"]
    function.set_outputs({**results, "third": build.read("third")})
    save_program(program, tmp_path / "model")
    again = load_program(tmp_path / "model")
    assert again.parameters.tied() == {"second": "first", "third": "first"}
    assert (tmp_path / "model" / "parameters.safetensors").stat().st_size < 1.1 * tensor.nbytes


def test_a_program_without_parameters(tmp_path):
    program = Program()
    function = program.add_function("main")
    function.set_outputs({"y": function.builder().arange(end=3)})
    save_program(program, tmp_path / "model")
    assert load_program(tmp_path / "model").digest() == program.digest()


# -- writing


def test_an_attribute_that_is_no_plain_data(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "_ops", dict(ops._ops))
    register_op("test.call", lambda x, *, f: f(x), infer=lambda x, *, f: x)
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (2,)))
    function.set_outputs({"y": function.builder().emit("test.call", x, f=torch.relu)})
    with pytest.raises(ProgramError, match="%test_call.*relu"):
        save_program(program, tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_a_saved_program_is_replaced(tmp_path):
    save_program(small_models.gpt2(), tmp_path / "model")
    first = load_program(tmp_path / "model")  # its parameters are mapped from the file that goes
    save_program(small_models.bert(), tmp_path / "model")
    assert load_program(tmp_path / "model").digest() == small_models.bert().digest()
    assert first.digest() == small_models.gpt2().digest()
    save_program(load_program(tmp_path / "model"), tmp_path / "model")
    assert load_program(tmp_path / "model").digest() == small_models.bert().digest()
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_something_else_is_not_overwritten(what, tmp_path):
    place = tmp_path / "mine"
    if what == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("text")
    else:
        place.write_text("text")
    with pytest.raises(ProgramError, match="will not overwrite"):
        save_program(small_models.bert(1), place)
    assert (place / "thesis.txt" if what == "folder" else place).read_text() == "text"
    assert os.listdir(tmp_path) == ["mine"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "model").mkdir()
    save_program(small_models.bert(1), tmp_path / "model")
    load_program(tmp_path / "model")


def test_a_missing_parent_is_an_error(tmp_path):
    with pytest.raises(ProgramError, match="cannot write"):
        save_program(small_models.bert(1), tmp_path / "no" / "model")


@contextmanager
def largest_file(size):
    """Writing beyond this many bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1000, 30_000])  # within program.json, within the parameters
def test_a_full_disk_leaves_nothing_and_the_old_program_alone(size, tmp_path):
    save_program(small_models.gpt2(1), tmp_path / "old")
    program = small_models.bert(1)
    program.main.builder().parameter("large", torch.zeros(100_000))
    for place in ("new", "old"):
        with largest_file(size), pytest.raises(ProgramError, match="cannot write"):
            save_program(program, tmp_path / place)
    assert os.listdir(tmp_path) == ["old"]
    assert load_program(tmp_path / "old").digest() == small_models.gpt2(1).digest()


# -- reading what is wrong


def refused(saved, said):
    saved.write()
    with pytest.raises(ProgramError, match=said) as caught:
        load_program(saved.folder)
    assert str(saved.folder) in str(caught.value)


def test_unknown_operations_are_all_named(saved):
    saved.node("gelu")["op"] = "mylib.fold"
    saved.node("tanh")["op"] = "other.op"
    refused(saved, "mylib.fold, other.op(.|\n)*install or import mylib, other")


def test_not_a_program(tmp_path):
    with pytest.raises(ProgramError, match="not a saved program"):
        load_program(tmp_path / "nowhere")
    (tmp_path / "program.json").write_text("[]")
    (tmp_path / "parameters.safetensors").write_bytes(b"")
    with pytest.raises(ProgramError):
        load_program(tmp_path)


def test_missing_parameters_file(saved):
    (saved.folder / "parameters.safetensors").unlink()
    with pytest.raises(ProgramError, match="parameters.safetensors"):
        load_program(saved.folder)


def test_another_format_version(saved):
    saved.data["version"] = 99
    refused(saved, "format version 99, this Tersor reads 2")


def test_forward_reference(saved):
    saved.node("tanh")["operands"] = [{"node": saved.nodes[-1]["name"]}]
    refused(saved, "before it is defined")


def test_reference_to_itself(saved):
    node = saved.node("tanh")
    node["operands"] = [{"node": node["name"]}]
    refused(saved, "before it is defined")


def test_a_value_defined_twice(saved):
    saved.node("tanh")["name"] = saved.node("gelu")["name"]
    refused(saved, "defines %gelu twice")


def test_a_shape_that_is_not_what_the_operands_give(saved):
    saved.node("tanh")["value"]["shape"] = ["batch", 99]
    refused(saved, "its operands give")


def test_a_parameter_of_another_shape(saved):
    node = next(n for n in saved.nodes if n.get("parameter") == "layer.0.up.weight")
    node["parameter"] = "layer.0.down.weight"
    refused(saved, "do not fit")


def test_a_parameter_that_does_not_exist(saved):
    next(n for n in saved.nodes if "parameter" in n)["parameter"] = "../../etc/passwd"
    refused(saved, "passwd.*does not exist")


def test_a_listed_parameter_that_is_not_there(saved):
    saved.data["order"].append("more")
    refused(saved, "missing tensors: more")


def _path_tricks(saved):
    saved.data["tied"] = {"../../x": "/etc/passwd"}
    saved.data["order"].append("../../x")


def _deep(saved):
    nested = []
    for _ in range(100):
        nested = [nested]
    saved.node("tanh")["operands"] = nested


HOSTILE = {
    "functions": lambda s: s.data.update(functions=3),
    "nodes": lambda s: s.data["functions"][0].update(nodes={"a": 1}),
    "node": lambda s: s.nodes.insert(0, None),
    "name": lambda s: s.nodes[0].update(name=["x"]),
    "op": lambda s: s.node("tanh").update(op={"x": 1}),
    "op number": lambda s: s.node("tanh").update(op=7),
    "operands": lambda s: s.node("tanh").update(operands="abc"),
    "operand": lambda s: s.node("tanh").update(operands=[{"node": ["x"]}]),
    "operand kind": lambda s: s.node("tanh").update(operands=[{"call": "os.system"}]),
    "two kinds": lambda s: s.node("tanh").update(operands=[{"node": "x", "dim": "n"}]),
    "no kind": lambda s: s.node("tanh").update(operands=[{}]),
    "deep": _deep,
    "attributes": lambda s: s.node("tanh").update(attributes=[1]),
    "attribute": lambda s: s.node("attention")["attributes"].update(heads="4"),
    "zero heads": lambda s: s.node("attention")["attributes"].update(heads=0, kv_heads=0),
    "huge number": lambda s: s.node("attention")["attributes"].update(heads=10**100),
    "value": lambda s: s.nodes[0].update(value=None),
    "dtype": lambda s: s.nodes[0]["value"].update(dtype=["int64"]),
    "no such dtype": lambda s: s.nodes[0]["value"].update(dtype="float3"),
    "shape": lambda s: s.nodes[0]["value"].update(shape=7),
    "size": lambda s: s.nodes[0]["value"].update(shape=[-1, 4]),
    "half size": lambda s: s.nodes[0]["value"].update(shape=[1.5]),
    "true size": lambda s: s.nodes[0]["value"].update(shape=[True]),
    "huge size": lambda s: s.nodes[0]["value"].update(shape=[10**30]),
    "dimension": lambda s: s.nodes[0]["value"].update(shape=["__import__('os')"]),
    "huge power": lambda s: s.nodes[0]["value"].update(shape=["batch**999999999"]),
    "long number": lambda s: s.nodes[0]["value"].update(shape=["9" * 5000 + "*batch"]),
    "range": lambda s: s.data["functions"][0]["dims"].update(batch=[4, 1]),
    "range of text": lambda s: s.data["functions"][0]["dims"].update(batch=["1", "2"]),
    "range of one": lambda s: s.data["functions"][0]["dims"].update(batch=[1]),
    "no dims": lambda s: s.data["functions"][0].update(dims={}),
    "outputs": lambda s: s.data["functions"][0].update(outputs=["y"]),
    "output": lambda s: s.data["functions"][0].update(outputs={"y": 1}),
    "same function": lambda s: s.data["functions"].append(s.data["functions"][0]),
    "same input": lambda s: s.nodes.append({**s.nodes[0], "name": "again"}),
    "same parameter": lambda s: s.data["order"].append(s.data["order"][0]),
    "site": lambda s: s.node("tanh").update(site=5),
    "paths": _path_tricks,
    "tied": lambda s: s.data.update(tied=[["a", "b"]]),
    "missing": lambda s: s.data.pop("order"),
    "states": lambda s: s.data.update(states=3),
    "state of no value": lambda s: s.data.update(states={"k": 1}),
    "state of no fixed size": lambda s: s.data["states"].update(k={"dtype": "float32", "shape": ["batch"]}),
    "unknown state": lambda s: s.nodes.insert(0, {"name": "k", "state": "k"}),
    "updates": lambda s: s.data["functions"][0].update(updates=["k"]),
    "unknown update": lambda s: s.data["functions"][0].update(updates={"k": s.nodes[0]["name"]}),
    "version": lambda s: s.data.update(version="1"),
    "format": lambda s: s.data.update(format="onnx"),
    "not a number": lambda s: s.nodes[0]["value"].update(shape=[float("nan")]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(what, saved):
    HOSTILE[what](saved)
    refused(saved, ".")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "null", "\ufffe", '{"format": "tersor-program"}', "9" * 5000]
)
def test_hostile_text_is_refused(text, saved):
    (saved.folder / "program.json").write_text(text)
    with pytest.raises(ProgramError):
        load_program(saved.folder)


def test_bytes_that_are_no_text(saved):
    (saved.folder / "program.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ProgramError):
        load_program(saved.folder)


def test_a_file_larger_than_any_program_is_not_read(saved):
    with open(saved.folder / "program.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ProgramError, match="larger than any program"):
        load_program(saved.folder)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1000, -1])
def test_truncated_parameters(cut, saved):
    file = saved.folder / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ProgramError, match="damaged"):
        load_program(saved.folder)


def test_a_header_that_claims_huge_sizes(saved):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for length in (len(header), 1 << 60):
        content = struct.pack("<Q", length) + header + bytes(64)
        (saved.folder / "parameters.safetensors").write_bytes(content)
        with pytest.raises(ProgramError, match="damaged"):
            load_program(saved.folder)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_loaded_or_refused(data, saved):
    """Replaces one random place of the JSON by something else: nothing but a ProgramError may come out."""
    tree = json.loads(json.dumps(saved.data))
    place, key = tree, None
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            break
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 9)) == 0:
            break
        place = place[key]
    place[key] = data.draw(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
                  st.just([]), st.just({}), st.sampled_from(["batch", "linear", {"dim": "batch"}, {"node": "gelu"}]))
    )  # fmt: skip
    (saved.folder / "program.json").write_text(json.dumps(tree))
    try:
        load_program(saved.folder)
    except ProgramError:
        pass
