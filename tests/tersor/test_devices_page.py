"""What docs/devices.md shows works: its commands and its Python."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import tersor
from tests.pages import blocks, shell

transformers = pytest.importorskip("transformers")

PAGE = "docs/devices.md"


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="needs qemu-user-static")
def test_the_page(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=32)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    inputs = {"input_ids": np.array([[2, 7, 11, 3]]), "attention_mask": np.ones((1, 4), np.int64)}
    np.savez("x.npz", **inputs)
    shown = shell("".join(blocks(PAGE, "sh")), tmp_path)
    assert "estimate for raspberry-pi-5, 4 threads: at least" in shown
    assert "length 16" in shown and "say nothing about a device" in shown
    with torch.no_grad():
        expected = model(**{n: torch.from_numpy(v) for n, v in inputs.items()}).last_hidden_state.numpy()
    found = np.load("y.npz")["last_hidden_state"]
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.99
    names = {"tersor": tersor, "inputs": inputs}
    exec(blocks(PAGE, "python")[0], names)
    np.testing.assert_array_equal(names["outputs"]["last_hidden_state"], found)
    assert "says nothing about a device" in str(names["model"].benchmark(calls=1))
