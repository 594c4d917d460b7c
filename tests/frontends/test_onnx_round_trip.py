"""Models written as ONNX files: right in onnxruntime, and the same programs again when they are read."""

from __future__ import annotations

import models
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from tersor import frontends  # noqa: E402
from tersor.frontends.onnx.export import to_onnx  # noqa: E402
from tersor.ir import Program  # noqa: E402


def _captured(name: str, dynamic: bool = True) -> Program:
    torch.manual_seed(0)
    model = models.prepared((models.TEXT[name] if name in models.TEXT else models.OTHER[name][0])())
    inputs = _inputs(name, 3, 12)
    dims = models.text_dims() if name in models.TEXT else {n: {0: ("batch", 1, 8)} for n in inputs}
    return frontends.capture(model, {**inputs, **models.no_cache(model)}, dynamic=dims if dynamic else None)


def _inputs(name: str, *sizes: int) -> dict[str, torch.Tensor]:
    return models.text(*sizes) if name in models.TEXT else models.OTHER[name][1](*sizes[:1])


def _check(program: Program, *batches: dict[str, torch.Tensor]) -> Program:
    """Within 1e-5 of the outputs' scale in onnxruntime; returns what capture makes of the file."""
    model = to_onnx(program)
    onnx.checker.check_model(model, full_check=True)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for inputs in batches:
        found = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
        expected = program(**inputs)
        for got, wanted in zip(found, expected.values(), strict=True):
            assert float((torch.from_numpy(got) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    return frontends.capture(model)


def _sites(program: Program) -> set[str]:
    return {n.meta["site"] for n in program.main.calls() if "site" in n.meta}


def _same(again: Program, program: Program) -> None:
    assert models.operations(again) == models.operations(program)
    assert _sites(again) == _sites(program)
    assert set(again.parameters) == set(program.parameters)
    assert again.main.inputs == program.main.inputs and again.main.outputs == program.main.outputs
    assert again.digest() == program.digest()


@pytest.mark.parametrize("name", [*models.TEXT, *models.OTHER])
def test_model(name: str) -> None:
    program = _captured(name)
    _same(_check(program, _inputs(name, 1, 1), _inputs(name, 2, 33)), program)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_model_of_one_size(name: str) -> None:
    program = _captured(name, dynamic=False)
    _same(_check(program, _inputs(name, 3, 12)), program)
