"""The benchmark's models, options and report; nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.models import MODELS
from benchmarks.report import Entry, Report, line
from benchmarks.run import parse
from tersor.peers import Measurement


def entry() -> Entry:
    return Entry(
        "bert",
        "1x128",
        2,
        [
            Measurement("tersor", "tersor 1", 1.0, [10.0, 8.0, 12.0], 1e-6),
            Measurement("peer", "peer 2", 1.0, [20.0, 15.0, 30.0], 1e-3, idle_load=0.5),
            Measurement("broken", failure="it does not start"),
        ],
    )


def test_ratio_is_the_peers_median_over_ours() -> None:
    assert entry().ratio("peer") == 2.0
    assert entry().ratio("broken") is None


def test_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    report = Report("2026-01-01 00:00", "run --all", {"cpu": "test"}, [entry()])
    as_json, as_markdown = report.write(tmp_path / "results", "first")
    rows = json.loads(as_json.read_text())["entries"][0]["measurements"]
    assert [row["median"] for row in rows] == [10.0, 20.0, None]
    assert [row["minimum"] for row in rows] == [8.0, 15.0, None]
    assert rows[1]["ratio"] == 2.0
    text = as_markdown.read_text()
    assert "| bert | 1x128 | 10 (8) | 20 (15)! [2.00] | failed |" in text
    assert "broken on bert 1x128, 2 thread(s): it does not start" in text
    assert "peer on bert 1x128, 2 thread(s): used 50% of a core" in text
    assert "tersor 1, peer 2" in text


def test_a_line_follows_the_run() -> None:
    assert line(entry()) == (
        "bert 1x128 2 thr: tersor 10 (8); peer 20 (15) [2.00] error 1.0e-03; broken failed: it does not start"
    )


@pytest.mark.parametrize("name", MODELS)
def test_inputs_fit_the_declared_axes(name: str) -> None:
    model = MODELS[name]
    batch, length = model.shapes[-1]
    inputs = model.inputs(batch, length)
    assert set(inputs) == set(model.dynamic_axes)
    for key, axes in model.dynamic_axes.items():
        assert inputs[key].shape[0] == batch and max(axes) < inputs[key].ndim
    assert model.label(batch, length).startswith(f"{batch}x")


def test_options_choose_models_shapes_and_engines(capsys: pytest.CaptureFixture) -> None:
    options = parse(
        ["--models", "gpt2,vit-b16", "--shapes", "1x16,8x128", "--threads", "1", "--engines", "torch"]
    )
    assert (options.models, options.shapes, options.threads) == (
        ["gpt2", "vit-b16"],
        [(1, 16), (8, 128)],
        [1],
    )
    assert "tvm" not in parse([]).engines and "tersor" in parse([]).engines
    for wrong in (["--models", "gpt5"], ["--shapes", "16"], ["--threads", "0"], ["--engines", "x"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "choose from" in capsys.readouterr().err
