"""Tables of embeddings in codes: as other tools store them, and written by us, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import TensorProto  # noqa: E402
from test_onnx_export import run_there  # noqa: E402
from test_onnx_integers import file, node  # noqa: E402

import tersor  # noqa: E402
from tersor import frontends  # noqa: E402
from tersor.frontends.onnx.export import to_onnx  # noqa: E402
from tersor.ir import Program  # noqa: E402
from tersor.passes import Pipeline  # noqa: E402

RANDOM = np.random.default_rng(0)
ROWS, WIDTH = 30, 8
IDS = {"ids": torch.tensor([[0, 29, 3], [7, 7, 11]])}
READ = node("Gather", "words.weight_quantized ids", "rows")


def table(codes: str = "int8", shape: tuple[int, ...] = (), zero: bool = False) -> dict[str, np.ndarray]:
    """Codes [ROWS, WIDTH], a scale and a zero point of this shape."""
    low = 0 if codes == "uint8" else -128
    middle = RANDOM.integers(100, 120, shape) if codes == "uint8" else RANDOM.integers(-9, 10, shape)
    return {
        "words.weight_quantized": RANDOM.integers(low, low + 256, (ROWS, WIDTH)).astype(codes),
        "scale": RANDOM.uniform(0.01, 0.02, shape).astype(np.float32),
        "zero": (middle if zero else middle * 0).astype(codes),
    }


def model(nodes: list, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    return file(nodes, tensors, {"ids": (TensorProto.INT64, ["batch", "length"])})


def looked_up_in_codes(program: Program) -> bool:
    """Whether the table is read in codes, at its site, and what is read is decoded."""
    (found,) = program.main.calls("embedding")
    (user,) = found.users
    stored = program.main.parameter(found.args[1])
    assert found.meta["site"] == "words" and found.args[1].target == "words.weight.codes"
    return stored.dtype in (torch.int8, torch.uint8) and user.target.name == "dequantize"


def same(program: Program, file: onnx.ModelProto) -> None:
    """Bit for bit what onnxruntime makes of the file, also without its optimizations' order of things."""
    assert torch.equal(program(**IDS)["y"], torch.from_numpy(run_there(file, IDS)["y"]))


@pytest.mark.parametrize(("codes", "zero"), [("uint8", True), ("int8", False), ("int8", True)])
def test_rows_decoded_after_the_look_up(codes, zero):
    """As onnxruntime's quantize_dynamic writes them."""
    made = model([READ, node("DequantizeLinear", "rows scale zero", "y")], table(codes, (), zero))
    program = frontends.capture(made)
    assert looked_up_in_codes(program) and len(program.main.calls()) == 2
    same(program, made)
    compiled = tersor.compile(made, recipe="quantized")
    np.testing.assert_array_equal(compiled(**IDS)["y"], run_there(made, IDS)["y"])


@pytest.mark.parametrize("codes", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(), (ROWS,)], ids=["one scale", "scale per row"])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_decoded_before_the_look_up(codes, shape, zero):
    decode = node("DequantizeLinear", "words.weight_quantized scale zero", "table", axis=0)
    made = model([decode, node("Gather", "table ids", "y")], table(codes, shape, zero))
    program = frontends.capture(made)
    (found,) = program.main.calls("embedding")
    assert found.args[1].target.name == "dequantize" and found.meta["site"] == "words"
    same(program, made)
    whole, report = Pipeline(["quantize.integers"]).run(program)
    assert looked_up_in_codes(whole) and not report.steps[0].skips
    same(whole, made)


@pytest.mark.parametrize("order", ["values read", "read values"])
def test_rows_decoded_by_arithmetic(order):
    nodes = [
        READ,
        node("Cast", "rows", "values", to=TensorProto.FLOAT),
        node("Gather", "scale ids", "read"),
        node("Mul", order, "y"),
    ]
    tensors = table("int8", (ROWS, 1))
    made = model(nodes, tensors)
    program = frontends.capture(made)
    assert looked_up_in_codes(program) and len(program.main.calls("index_select")) == 1
    same(program, made)
    # scales of other rows are something else
    tensors["one"] = np.array(1)
    nodes[2:3] = [node("Sub", "ids one", "others"), node("Gather", "scale others", "read")]
    assert not frontends.capture(model(nodes, tensors)).main.calls("dequantize")


@pytest.mark.parametrize("whole", [False, True], ids=["decoded whole", "decoded by row"])
def test_out_and_back_again(whole):
    names = ["quantize.embeddings", "quantize.integers"][: 1 + whole]
    wide = model(
        [node("Gather", "words.weight ids", "y")], {"words.weight": RANDOM.random((9000, WIDTH), np.float32)}
    )
    program, _ = Pipeline(names).run(frontends.capture(wide))
    written = to_onnx(program)
    onnx.checker.check_model(written, full_check=True)
    assert written.ByteSize() < 0.42 * wide.ByteSize()
    used = [n.op_type for n in written.graph.node]
    assert ("DequantizeLinear" in used) != whole and used.count("Gather") == 1 + whole
    same(program, written)
    again = frontends.capture(written)
    assert again.digest() == program.digest() and set(again.parameters) == set(program.parameters)
    assert [n.meta.get("site") for n in again.main.calls("embedding")] == ["words"]


@pytest.mark.parametrize("name", ["quantize.bf16", "quantize.fp16"])
def test_tables_of_16_bits_out_and_back_again(name):
    wide = model(
        [node("Gather", "words.weight ids", "y")], {"words.weight": RANDOM.random((9000, WIDTH), np.float32)}
    )
    program, _ = Pipeline([name]).run(frontends.capture(wide))
    written = to_onnx(program)
    assert written.ByteSize() < 0.52 * wide.ByteSize()
    same(program, written)
    assert frontends.capture(written).digest() == program.digest()
