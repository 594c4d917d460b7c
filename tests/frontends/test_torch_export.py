"""Capture of modules: signature, names, tied weights, provenance, third-party operators, and every refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import models
import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import CaptureError, InputError, UnsupportedOpError
from tersor.frontends.torch_export import capture
from tersor.ir import Dim, Value, register_op, run

X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


class Call(nn.Module):
    """A module around a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Nested(nn.Module):
    def forward(self, a, b=None, *, c=1):
        pair = NamedPair(a + c, b - c)
        return {"whole": Record(a * 2, None, (b * 3, [a])), "pair": pair}


class NamedPair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Record:
    main: torch.Tensor
    nothing: torch.Tensor | None
    parts: tuple


def test_inputs_keep_the_models_order_and_outputs_nest_by_dotted_names():
    x = torch.randn(2, 3)
    program = capture(Nested(), {"c": 4, "b": x + 1, "a": x})
    assert list(program.main.inputs) == ["a", "b"]
    results = run(program.main, {"a": x, "b": x + 1})
    expected = {
        "whole.main": x * 2, "whole.parts.0": (x + 1) * 3, "whole.parts.1.0": x, "pair.first": x + 4,
        "pair.second": x + 1 - 4,
    }  # fmt: skip
    assert list(results) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor)


@pytest.mark.parametrize("examples", [(X,), [X], X, {"x": X}, {"x": X.numpy()}])
def test_examples_by_position_by_name_or_from_numpy(examples):
    program = capture(Call(torch.tanh), examples)
    assert {n: str(v) for n, v in program.main.inputs.items()} == {"x": "float32[2, 16, 8]"}
    assert program.main.outputs == ("output",)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    model.train()
    model[0].eval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    program = capture(model, (X,))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert models.operations(program) == {"linear": 1}, "dropout does nothing in evaluation mode"
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(2, 5),))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_tied_weights_are_one_parameter():
    model = models.prepared(models.TEXT["gpt2"]())
    program = capture(model, {**models.text(), "use_cache": False})
    table = model.transformer.wte.weight
    assert [n for n, p in program.parameters.items() if p.tensor.shape == table.shape] == [
        "transformer.wte.weight"
    ]
    assert program.parameters["transformer.wte.weight"].tensor.data_ptr() == table.data_ptr(), "not copied"


def test_a_transposed_weight_keeps_its_name():
    program = capture(models.prepared(models.TEXT["gpt2"]()), {**models.text(), "use_cache": False})
    assert tuple(program.parameters["transformer.h.0.mlp.c_fc.weight"].value.shape) == (128, 32)
    assert "transformer.h.1.attn.c_attn.key.weight" in program.parameters
    assert not any("_1" in name.rsplit(".", 1)[-1] for name in program.parameters)


def test_sites_modules_and_source_lines():
    program = capture(models.TEXT["bert"](), models.text(), models.text_dims())
    by_site = {n.meta["site"]: n for n in program.main.calls() if "site" in n.meta}
    assert {
        "embeddings.word_embeddings",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.attention",
        "encoder.layer.1.attention.output.LayerNorm",
        "encoder.layer.0.intermediate.intermediate_act_fn",
        "pooler.dense",
    } <= by_site.keys()
    node = by_site["encoder.layer.1.attention.self.attention"]
    assert node.target.name == "attention"
    assert node.meta["module"] == "encoder.layer.1.attention.self"
    file, line = by_site["pooler.dense"].meta["source"].rsplit(":", 1)
    assert file.endswith("models/bert/modeling_bert.py") and int(line) > 0


def test_sites_of_split_projections_and_of_weights_without_modules():
    program = capture(models.PostNorm(), models.text())
    sites = {n.meta.get("site") for n in program.main.calls()}
    layer = "encoder.layers.0"
    assert {
        f"{layer}.self_attn.{role}"
        for role in ("in_proj.query", "in_proj.key", "in_proj.value", "attention", "out_proj")
    } <= sites
    assert {f"{layer}.linear1", f"{layer}.norm2", "embed"} <= sites


def test_dynamic_dimensions_of_size_one_are_enlarged_and_named_in_shapes():
    program = capture(
        Call(lambda x: x.flatten(1)), (X[:1],), {"x": {0: ("batch", 1, 4), 1: ("length", 1, 20)}}
    )
    batch, length = Dim.symbol("batch"), Dim.symbol("length")
    assert program.main.inputs["x"].shape == (batch, length, 8)
    assert program.main.results[0].meta["value"].shape == (batch, length * 8)
    for b, t in [(1, 1), (4, 20), (2, 3)]:
        x = torch.randn(b, t, 8)
        torch.testing.assert_close(run(program.main, {"x": x})["output"], x.flatten(1))


def test_dimensions_used_as_numbers():
    program = capture(Call(lambda x: x.sum(1) / x.shape[1]), (X,), {"x": {1: ("length", 1, 20)}})
    for t in (1, 7):
        x = torch.randn(2, t, 8)
        torch.testing.assert_close(run(program.main, {"x": x})["output"], x.mean(1))


def test_an_operator_without_converter_is_taken_apart_by_torch():
    program = capture(Call(torch.nn.functional.hardswish), (X,))
    torch.testing.assert_close(run(program.main, {"x": X})["output"], torch.nn.functional.hardswish(X))


def test_third_party_operators_are_taken_as_they_are():
    @torch.library.custom_op("tersor_test::clip", mutates_args=())
    def clip(x: torch.Tensor, *, bound: float = 1.0) -> torch.Tensor:
        return x.clamp(-bound, bound)

    clip.register_fake(lambda x, *, bound=1.0: torch.empty_like(x))
    op = register_op(
        "tersor_test.clip",
        lambda x, *, bound=1.0: x.clamp(-bound, bound),
        infer=lambda x, *, bound=1.0: x,
        captures=(torch.ops.tersor_test.clip.default,),
    )
    program = capture(Call(lambda x: torch.ops.tersor_test.clip(x, bound=0.5) + 1), (X,))
    node = program.main.calls("tersor_test.clip")[0]
    assert node.target is op and node.kwargs == {"bound": 0.5}
    torch.testing.assert_close(run(program.main, {"x": X})["output"], X.clamp(-0.5, 0.5) + 1)


# -- refusals


class Modes(nn.Module):
    def forward(self, x):
        return torch.mode(x, keepdim=True)[0]


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Modes(), Modes()

    def forward(self, x):
        return self.a(x) + self.b(x) + torch.fft.fft(x).real


def test_all_unsupported_operators_are_reported_at_once():
    with pytest.raises(UnsupportedOpError) as caught:
        capture(Unsupported(), (X,))
    message = str(caught.value)
    assert "aten.mode.default, 2 times: a (" in message and "; b (" in message
    assert "aten._fft" in message
    assert "test_torch_export.py:" in message and "register_op" in message


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(32, 8))

    def forward(self, x):
        return x + self.table[: x.shape[1]]


def refuse(error, model, examples, dynamic=None, **options):
    with pytest.raises(error) as caught:
        capture(model, examples, dynamic, **options)
    return str(caught.value)


def test_control_flow_on_values_names_the_line():
    message = refuse(CaptureError, Branches(), (X,))
    assert (
        "depends on the values of tensors" in message
        and "if x.sum() > 0" in message
        and "torch.where" in message
    )


def test_a_range_beyond_what_the_model_takes_says_the_limit():
    message = refuse(CaptureError, Positions(), (X,), {"x": {1: ("length", 1, 64)}})
    assert "length must be at most 32" in message


def test_a_size_built_into_the_model_is_named():
    message = refuse(CaptureError, Call(lambda x: x.view(2, 16, 8)), (X,), {"x": {1: ("length", 1, 64)}})
    assert "length = 16 only" in message and "leave length out" in message


def test_two_dimensions_that_must_be_equal():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    message = refuse(CaptureError, Sum(), (X, X), {"x": {1: ("a", 1, 64)}, "y": {1: ("b", 1, 64)}})
    assert "one name" in message


def test_a_size_that_is_no_polynomial():
    message = refuse(
        CaptureError, Call(lambda x: x[:, : x.shape[1] // 2]), (X,), {"x": {1: ("length", 2, 64)}}
    )
    assert "length" in message and "static" in message


def test_an_error_of_the_model_itself_is_passed_on():
    def fails(x):
        raise ValueError("no such thing")

    message = refuse(CaptureError, Call(fails), (X,))
    assert "ValueError: no such thing" in message and "test_torch_export.py" in message


def test_outputs_that_are_no_tensors():
    assert "output 1 is a str" in refuse(CaptureError, Call(lambda x: (x, "text")), (X,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    model = nn.Linear(8, 8)
    model.weight.data[1, 2] = bad
    message = refuse(InputError, model, (X,))
    assert "'weight'" in message and "1 of 64" in message
    program = capture(model, (X,), allow_nonfinite=True)
    assert not torch.isfinite(program.parameters["weight"].tensor).all()


def test_large_finite_weights_pass():
    model = nn.Linear(8, 8)
    model.weight.data.fill_(3e38)  # their sum overflows
    capture(model, (X,))


def test_weights_without_data():
    assert "no data" in refuse(InputError, nn.Linear(8, 8, device="meta"), (X,))


@pytest.mark.parametrize(
    ("examples", "part"),
    [
        ({"y": X}, "unknown: y; missing: x"),
        ((X, X), "2 example inputs for a model of 1 arguments"),
        ({"x": [1, 2]}, "is a list"),
        ({"x": 3}, "no tensor"),
        ({}, "missing: x"),
        ({0: X}, "a dict with the keys 0"),
        (5, "are a int"),
        ({1, 2}, "are a set"),
        ({"x": torch.zeros(0, 8)}, "'x' is empty"),
    ],
)
def test_examples_that_do_not_fit(examples, part):
    message = refuse(InputError, Call(torch.tanh), examples)
    assert part in message and "fix: " in message


@pytest.mark.parametrize("examples", [X, X.numpy(), (X,), [X], {"x": X}], ids=lambda e: type(e).__name__)
def test_one_input_may_be_given_in_many_ways(examples):
    assert capture(Call(torch.tanh), examples).main.inputs == {"x": Value("float32", tuple(X.shape))}


def test_dtypes_that_disagree_are_explained():
    message = refuse(CaptureError, nn.Linear(8, 8), (X.double(),))
    assert "expected float64" in message and "dtypes agree" in message


def test_a_misspelt_name_is_not_swallowed_by_keywords():
    class Takes(nn.Module):
        def forward(self, input_ids=None, mask=None, **more):
            return input_ids + 1

    assert "unknown: inputs_ids" in refuse(InputError, Takes(), {"inputs_ids": X})
    assert set(capture(Takes(), {"input_ids": X, "anything_else": X}).main.inputs) >= {"input_ids"}


def test_results_without_a_tensor():
    assert "no tensor" in refuse(CaptureError, Call(lambda x: None), (X,))


def test_a_scripted_module():
    scripted = torch.jit.script(nn.Linear(8, 8))
    assert "TorchScript" in refuse(InputError, scripted, (X,))


def test_something_else_than_a_module():
    assert "torch.nn.Module" in refuse(InputError, np.tanh, (X,))
