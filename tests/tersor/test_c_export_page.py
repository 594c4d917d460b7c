"""What docs/c-export.md shows works: its commands, its C program, its Python."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import tersor
from tests.pages import blocks, shell

transformers = pytest.importorskip("transformers")

PAGE = "docs/c-export.md"


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("cmake")), reason="needs cc and cmake")
def test_the_page(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertModel(
        transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=64)
    )
    model.eval().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    shown = shell(blocks(PAGE, "sh")[0], tmp_path)
    assert len(re.findall(r"^  last_hidden_state: \S+ ", shown, re.MULTILINE)) == 2

    (tmp_path / "user.c").write_text(blocks(PAGE, "c")[0])
    build = ["cc", "-std=c99", "-Wall", "-Werror", "-Iout", "user.c", "out/libencoder.a", "-lm", "-lpthread"]
    subprocess.run([*build, "-o", "user"], check=True, timeout=60)
    shown = subprocess.run(["./user"], check=True, capture_output=True, text=True, timeout=60).stdout
    ids, mask = np.array([[2, 7, 11, 3]]), np.ones((1, 4), np.int64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
    assert shown.startswith("no error ")
    assert float(shown.split()[-1]) == pytest.approx(expected[0, 0, 0].item(), abs=0.05)

    monkeypatch.syspath_prepend(tmp_path / "out")
    names = {"ids": ids, "mask": mask}
    exec(blocks(PAGE, "python")[1], names)
    np.testing.assert_allclose(names["outputs"]["last_hidden_state"], expected.numpy(), atol=0.05)
    importlib.invalidate_caches()

    text = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    exec(blocks(PAGE, "python")[0], {"tersor": tersor, "model": model, "example_inputs": text})
