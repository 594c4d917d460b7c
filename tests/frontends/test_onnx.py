"""Models through torch's ONNX exporter: the same program as from torch, whatever the exporter takes apart.

Those of transformers are in the zoo, which checks the same of each; here are models written by hand, and what depends
on sizes, names and the exporter.
"""

from __future__ import annotations

import logging
import warnings

import models
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from tersor import frontends  # noqa: E402
from tersor.errors import CaptureError, InputError  # noqa: E402
from tersor.frontends.torch_export import flatten_outputs  # noqa: E402
from tersor.ir import Program, Range  # noqa: E402

BY_HAND = ["post_norm", "post_norm_time_first", "spelt_out"]
DYNAMIC = models.text_dims()


def _built(name: str) -> nn.Module:
    """Every matrix is different, or the exporter would store equal ones once, under one of their names."""
    torch.manual_seed(0)
    model = models.prepared(models.TEXT[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


def export(model: nn.Module, inputs: dict, dynamic: dict, path) -> str:
    """torch.onnx.export with named dynamic dimensions."""
    dims = {
        d[0]: torch.export.Dim(d[0], min=d[1], max=d[2]) for axes in dynamic.values() for d in axes.values()
    }
    shapes = {n: {a: dims[d[0]] for a, d in dynamic[n].items()} for n in inputs}
    arguments = {**inputs, **models.no_cache(model)}
    shapes.update({n: None for n in models.no_cache(model)})
    silenced = logging.root.manager.disable
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        logging.disable(logging.ERROR)
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (), kwargs=arguments, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        logging.disable(silenced)
    program.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each model with its file, made once."""
    made: dict[str, tuple[nn.Module, str]] = {}

    def get(name: str) -> tuple[nn.Module, str]:
        if name not in made:
            model, path = _built(name), tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
            made[name] = model, export(model, models.text(), DYNAMIC, path)
        return made[name]

    return get


@pytest.mark.parametrize("name", BY_HAND)
def test_file_gives_the_program_that_torch_gives(exported, name):
    model, path = exported(name)
    check_same(model, frontends.capture(path, dynamic=DYNAMIC))


def check_same(model: nn.Module, program: Program) -> None:
    """The program is that which torch gives, at other sizes than the file was made with too."""
    from_torch = frontends.capture(model, {**models.text(), **models.no_cache(model)}, dynamic=DYNAMIC)
    assert models.operations(program) == models.operations(from_torch)
    assert _sites(program) == _sites(from_torch)
    for sizes in ((1, 5), (2, 33)):
        inputs = models.text(*sizes)
        expected = models.reference(model, inputs).values()
        for actual, wanted in zip(program(**inputs).values(), expected, strict=True):
            assert float((actual - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_sizes_give_the_same_too(exported, name, batch):
    model, path = exported(name)
    fixed = {n: {0: ("batch", batch, batch), 1: ("length", 12, 12)} for n in models.text()}
    program = frontends.capture(path, dynamic=fixed)
    from_torch = frontends.capture(model, {**models.text(batch, 12), **models.no_cache(model)})
    program.main.outputs = from_torch.main.outputs  # the exporter calls them after operators
    assert program.digest() == from_torch.digest()


class _Positional(nn.Module):
    """The TorchScript exporter takes positional arguments and returns tuples."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        options = models.no_cache(self.model)
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
        return tuple(flatten_outputs(result).values())


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "spelt_out"])
def test_torchscript_exporter_gives_the_same_too(name, tmp_path):
    model = _Positional(_built(name)).eval()
    inputs, path = models.text(), tmp_path / "model.onnx"
    axes = {n: {0: "batch", 1: "length"} for n in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(inputs.values()), str(path), dynamo=False, opset_version=17, input_names=list(inputs),
            dynamic_axes=axes,
        )  # fmt: skip
    check_same(model, frontends.capture(path, dynamic=DYNAMIC))


def _sites(program) -> set[str]:
    return {n.meta["site"] for n in program.main.calls() if "site" in n.meta}


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_that_is_called_twice_is_one_layer(tmp_path):
    model, inputs = _Twice().eval(), {"x": torch.randn(2, 8)}
    program = frontends.capture(export(model, inputs, {"x": {}}, tmp_path / "model.onnx"))
    assert sorted(program.parameters) == ["layer.bias", "layer.weight"]
    assert _sites(program) == _sites(frontends.capture(model, inputs)) == {"layer", "layer_1", "tanh"}


def test_dimensions_keep_the_names_of_the_file(exported):
    _, path = exported("distilbert")
    program = frontends.capture(path)
    assert program.main.dims == {"batch": Range(1, 8), "length": Range(1, 512)}
    program = frontends.capture(path, dynamic={"input_ids": {1: ("tokens", 2, 40)}})
    assert program.main.dims == {"batch": Range(1, 8), "tokens": Range(2, 40)}
    program = frontends.capture(path, dynamic={"input_ids": {0: ("batch", 1, 1), 1: ("length", 16, 16)}})
    assert not program.main.dims and program.main.inputs["input_ids"].shape == (1, 16)


def test_assumed_ranges_end_where_positions_end(exported):
    path = exported("spelt_out")[1]
    assert frontends.capture(path).main.dims["length"].max == 64, "its tables have 64 rows"
    with pytest.raises(CaptureError, match="64"):
        frontends.capture(path, dynamic={"input_ids": {1: ("length", 1, 65)}})


@pytest.mark.parametrize(
    "dynamic, message",
    [
        ({"ids": {0: ("batch", 1, 8)}}, "dynamic names the input 'ids'"),
        ({"input_ids": {2: ("batch", 1, 8)}}, "axis 2"),
        ({"input_ids": {0: ("batch", 8, 1)}}, "dynamic dimension"),
        ({"input_ids": {0: ("a", 1, 8)}, "attention_mask": {0: ("b", 1, 8)}}, "'a' and 'b'"),
    ],
)
def test_unusable_dimensions(exported, dynamic, message):
    with pytest.raises(InputError, match=message):
        frontends.capture(exported("bert")[1], dynamic=dynamic)


def test_examples_are_checked(exported):
    path = exported("post_norm")[1]
    assert frontends.capture(path, models.text(12, 600)).main.dims == {
        "batch": Range(1, 12), "length": Range(1, 600),
    }  # fmt: skip
    with pytest.raises(InputError, match="missing: attention_mask"):
        frontends.capture(path, {"input_ids": models.text()["input_ids"]})
    with pytest.raises(InputError, match="two sizes"):
        frontends.capture(path, {**models.text(2, 8), "attention_mask": models.text(2, 9)["attention_mask"]})
    with pytest.raises(CaptureError, match="64"):
        frontends.capture(exported("spelt_out")[1], models.text(2, 65))
