"""How accuracy is computed; no model is downloaded and no data read but what the tests write."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import perplexity, similarity
from benchmarks.accuracy.variants import VARIANTS, pipeline
from benchmarks.record import Record
from tersor.errors import PipelineError


def test_equal_scores_share_their_mean_rank() -> None:
    np.testing.assert_array_equal(similarity.ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1.0, 3.5, 2.0])
    rising = np.array([1.0, 2.0, 3.0, 4.0])
    assert similarity.spearman(rising, rising**3) == pytest.approx(1)
    assert similarity.spearman(rising, -rising) == pytest.approx(-1)


def test_padding_is_no_part_of_a_vector() -> None:
    hidden = np.array([[[3.0, 4.0], [100.0, 0.0]]])
    found = similarity.pooled({"hidden": hidden}, np.array([[1, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8]])
    own = similarity.pooled({"hidden": hidden, "sentence": np.array([[0.0, 2.0]])}, np.array([[1, 1]]))
    np.testing.assert_allclose(own, [[0.0, 1.0]])


def test_pairs_are_read_first_sentences_first(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text('"One, two",three,1.5\nfour,five,5\n')
    sentences, scores = similarity.read(file)
    assert sentences == ["One, two", "four", "three", "five"] and scores.tolist() == [1.5, 5.0]


def test_perplexity_of_a_uniform_and_of_a_certain_model() -> None:
    text = [np.array([[0, 1, 2, 3]]), np.array([[3, 2, 1, 0]])]
    assert perplexity.perplexity(lambda ids: np.zeros((1, 4, 8)), text) == pytest.approx(8)

    def knows_the_next(ids: np.ndarray) -> np.ndarray:
        logits = np.zeros((1, 4, 8))
        logits[0, np.arange(3), ids[0, 1:]] = math.log(7)  # as likely as the seven others together
        return logits

    assert perplexity.perplexity(knows_the_next, text) == pytest.approx(2)


def test_windows_are_full_and_share_nothing(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("abcdefgh")

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    found = perplexity.windows(tokenizer, file, 3)
    assert [w.tolist() for w in found] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert perplexity.spread(list(range(10)), 3) == [0, 3, 6] and perplexity.spread([1], 3) == [1]


def test_variants_differ_from_their_recipe_by_smoothing() -> None:
    def passes(name: str) -> list[str]:
        return [p.name for p in pipeline(name).passes]

    smoothing = "smooth.smoothquant"
    for recipe in ("int8", "int8-dynamic"):
        assert [p for p in passes(recipe) if p != smoothing] == passes(f"{recipe}-unsmoothed")
        assert smoothing in passes(recipe) and smoothing not in passes(f"{recipe}-unsmoothed")
    for name in VARIANTS:
        made = pipeline(name)
        made.check()
        assert made.name == name
    with pytest.raises(PipelineError, match="int9"):
        pipeline("int9")


def test_a_record_holds_what_was_printed_and_no_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "pairs.csv"
    data.write_text("")
    record = Record("Pairs", ["run", "--data", str(data)], ["tersor"], "Two pairs.", ("model", "score"))
    record.add("ours", "0.5")
    record.write(tmp_path, "pairs")
    (written,) = tmp_path.glob("*-pairs.md")
    text = written.read_text()
    assert "`run --data data/pairs.csv`" in text and "| model | score |\n|---|---|\n| ours | 0.5 |\n" in text
    assert str(tmp_path) not in text
    assert text.strip() in capsys.readouterr().out
