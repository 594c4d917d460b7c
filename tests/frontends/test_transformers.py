"""Transformers models: examples made for the architecture, settings restored, folders loaded or refused."""

from __future__ import annotations

import json

import models
import numpy as np
import pytest
import torch
from torch import nn

from tersor import frontends
from tersor.errors import InputError, TersorError
from tersor.frontends import transformers as frontend


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    models.prepared(models.TEXT["bert"]()).save_pretrained(tmp_path)
    return tmp_path


def test_example_inputs_fit_the_architecture():
    text = frontend.make_example_inputs(models.TEXT["roberta"]())
    assert {n: tuple(t.shape) for n, t in text.items()} == {"input_ids": (2, 16), "attention_mask": (2, 16)}
    assert text["attention_mask"].sum(1).tolist() == [16, 13], "padding is ragged"
    assert (text["input_ids"] == 1).equal(text["attention_mask"] == 0), (
        "padding has the padding id, nothing else has"
    )
    assert tuple(frontend.make_example_inputs(models.OTHER["vit"][0]())["pixel_values"].shape) == (
        2,
        3,
        16,
        16,
    )
    sound = frontend.make_example_inputs(models.OTHER["whisper_encoder"][0]())
    assert tuple(sound["input_features"].shape) == (2, 8, 20)


def test_automatic_dimensions_end_where_positions_end():
    program = frontends.capture(models.TEXT["roberta"](), dynamic="auto")
    assert program.main.dims["length"].max == 62, "64 rows, of which 2 belong to the padding id"
    program = frontends.capture(models.OTHER["vit"][0](), dynamic="auto")
    assert set(program.main.dims) == {"batch"}


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray], ids=["torch", "numpy"])
def test_automatic_dimensions_with_examples_of_both_kinds(kind):
    model = models.TEXT["bert"]()
    examples = {name: kind(value) for name, value in frontend.make_example_inputs(model).items()}
    assert set(frontends.capture(model, examples, "auto").main.dims) == {"batch", "length"}


def test_masks_vary_with_their_ids():
    model, length = models.TEXT["bert"](), ("length", 1, 32)
    program = frontends.capture(model, dynamic={"input_ids": {1: length}})
    assert str(program.main.inputs["attention_mask"]) == "int64[2, length]"
    program = frontends.capture(model, dynamic={"input_ids": {0: ("batch", 1, 8), 1: length}})
    assert str(program.main.inputs["attention_mask"]) == "int64[batch, length]"
    with pytest.raises(TersorError):
        frontends.capture(model, dynamic={"input_ids": {1: length}, "attention_mask": {}})


def test_settings_are_restored():
    model = models.TEXT["llama"](attn_implementation="eager")
    model.config.use_cache, model.config.return_dict = True, False
    model.train()
    program = frontends.capture(model)
    assert program.main.outputs == ("logits",)
    assert (model.config.use_cache, model.config.return_dict, model.training) == (True, False, True)
    assert model.config._attn_implementation == "eager"


def test_wrapped_models_are_unwrapped():
    model = models.TEXT["bert"]()
    assert frontend.unwrap(nn.DataParallel(model)) is model
    assert frontend.unwrap(torch.compile(model)) is model


def test_a_folder_is_loaded_with_the_class_it_names(folder):
    model = frontend.load(folder)
    assert type(model).__name__ == "BertModel" and not model.training
    program = frontends.capture(folder, models.text())
    assert models.error(program, model, models.text()) <= 1e-5


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not a model configuration"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: edit(f, architectures=["NoSuchModel"]), "NoSuchModel"),
        (lambda f: edit(f, architectures=["BertForSequenceClassification"]), "lacks 2 weights"),
        (lambda f: edit(f, intermediate_size=64), "cannot be loaded"),
        (_truncate, "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, part):
    damage(folder)
    with pytest.raises(InputError) as caught:
        frontends.capture(folder)
    assert part in str(caught.value)


def test_paths_that_are_no_folders(tmp_path):
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="not a folder"):
            frontends.capture(path)


def test_plain_modules_need_examples_and_named_dimensions():
    with pytest.raises(InputError, match="needs example inputs"):
        frontends.capture(nn.Linear(3, 3))
    with pytest.raises(InputError, match="transformers models only"):
        frontends.capture(nn.Linear(3, 3), (torch.ones(2, 3),), "auto")
