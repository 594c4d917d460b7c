"""The programs in examples/ do what they say."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.pages import ROOT, blocks, shell
from tests.tersor import sentence_encoder
from tests.tersor.sentence_encoder import SENTENCES

pytest.importorskip("transformers")

EXAMPLE = ROOT / "examples/sentence_similarity"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_sentence_similarity(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    folder, weights = tmp_path / "all-MiniLM-L6-v2", tmp_path / "out/weights.bin"
    model = sentence_encoder.save(folder)
    shown = shell(blocks("examples/sentence_similarity/README.md", "sh")[0], tmp_path)
    tokens = [sentence_encoder.ids(folder, sentence) for sentence in SENTENCES]
    expected = sentence_encoder.cosine(model, *tokens)
    assert len(tokens[0]) > len(tokens[1]) and expected < 0.999
    assert float(shown.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)

    strict = [
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wconversion",
        "-Werror",
        f"-I{tmp_path / 'out'}",
    ]
    command = ["cc", *strict, "-fsyntax-only", EXAMPLE / "similarity.c"]
    subprocess.run(command, check=True, timeout=60)

    def run(*words) -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / "similarity", *words], capture_output=True, text=True, timeout=60)

    texts = [" ".join(map(str, ids)) for ids in tokens]
    assert float(run(weights, *texts[::-1]).stdout) == pytest.approx(expected, abs=1e-5)
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
