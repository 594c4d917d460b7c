"""The programs in examples/ do what they say."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import tersor
from tests.pages import ROOT
from tests.tersor import sentence_encoder
from tests.tersor.sentence_encoder import SENTENCES

pytest.importorskip("transformers")

EXAMPLE = ROOT / "examples/sentence_similarity"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_sentence_similarity(tmp_path):
    model = sentence_encoder.save(tmp_path / "model")
    example = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: ("batch", 1, 4), 1: ("length", 1, 64)}
    compiled = tersor.compile(
        model,
        {"input_ids": example, "attention_mask": example},
        dynamic={"input_ids": axes, "attention_mask": axes},
        threads=1,
    )
    out, program = compiled.export_c(tmp_path / "out", name="encoder"), tmp_path / "similarity"
    strict = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", f"-I{out}"]
    files = [EXAMPLE / "similarity.c", out / "libencoder.a", "-lm", "-lpthread"]
    subprocess.run(["cc", *strict, *files, "-o", program], check=True, timeout=120)

    def run(*words) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], capture_output=True, text=True, timeout=60)

    texts, tokens = [], []
    for sentence in SENTENCES:
        command = [sys.executable, EXAMPLE / "tokens.py", tmp_path / "model", sentence]
        texts.append(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
        tokens.append(sentence_encoder.ids(tmp_path / "model", sentence))
    assert len(tokens[0]) > len(tokens[1]) and [t.split() for t in texts] == [
        list(map(str, t)) for t in tokens
    ]
    weights = out / "weights.bin"
    expected = sentence_encoder.cosine(model, *tokens)
    assert expected < 0.999
    for order in (texts, texts[::-1]):
        assert float(run(weights, *order).stdout) == pytest.approx(expected, abs=1e-5)
    assert float(run(weights, texts[0], texts[0]).stdout) == pytest.approx(1, abs=1e-6)

    for words, status, said in (
        ((weights,), 2, "usage"),
        ((weights, "2 x 3", "2 3"), 2, "not between 1 and 256 token ids: 2 x 3"),
        ((weights, "", "2 3"), 2, "token ids"),
        ((weights, "2 " * 257, "2 3"), 2, "token ids"),
        ((weights, "2 99999999999999999999", "2 3"), 2, "token ids"),
        ((weights, "2 " * 65, "2 3"), 1, "outside its range"),
        ((tmp_path / "nowhere", "2 3", "2 3"), 1, "cannot be read"),
    ):
        done = run(*words)
        assert (done.returncode, done.stdout) == (status, "") and said in done.stderr
