"""The benchmark's models, options and report; nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines import BESIDE, OTHERS
from benchmarks.floor import Floor
from benchmarks.kernels.gemm import peak
from benchmarks.models import MODELS, Model
from benchmarks.report import Entry, Report, line
from benchmarks.run import parse
from tersor.peers import Measurement


def entry() -> Entry:
    return Entry(
        "bert",
        "1x128",
        2,
        [
            Measurement("tersor", "tersor 1", 1.0, [10.0, 8.0, 12.0], 1e-6, 0.9999999),
            Measurement("peer", "peer 2", 1.0, [20.0, 15.0, 30.0], 1e-3, 0.99, idle_load=0.5),
            Measurement("broken", failure="it does not start"),
        ],
    )


def test_ratio_is_the_peers_median_over_ours() -> None:
    assert entry().ratio("peer") == 2.0
    assert entry().ratio("broken") is None


def test_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    report = Report("2026-01-01 00:00", "run --all", {"cpu": "test"}, entries=[entry()])
    as_json, as_markdown = report.write(tmp_path / "results", "first")
    rows = json.loads(as_json.read_text())["entries"][0]["measurements"]
    assert [row["median"] for row in rows] == [10.0, 20.0, None]
    assert [row["minimum"] for row in rows] == [8.0, 15.0, None]
    assert rows[1]["ratio"] == 2.0
    text = as_markdown.read_text()
    assert "| bert | 1x128 | 10 (8) | 20 (15) [2.00]! | failed |" in text
    assert "broken on bert 1x128, 2 thread(s): it does not start" in text
    assert "peer on bert 1x128, 2 thread(s): used 50% of a core" in text
    assert "tersor 1, peer 2" in text


def test_a_recipe_that_rounds_is_reported_with_cosines_and_its_floor(tmp_path: Path) -> None:
    measured = entry()
    measured.floor = 5.0
    report = Report("2026-01-01 00:00", "run --recipe int8", {"cpu": "test"}, "int8", [measured])
    as_json, as_markdown = report.write(tmp_path, "second")
    assert json.loads(as_json.read_text())["recipe"] == "int8"
    text = as_markdown.read_text()
    assert "| model | input | tersor | peer | broken | floor |" in text
    assert "| 10 (8) cos 1.000000 | 20 (15) [2.00] cos 0.990000 | failed | 5 [2.00] |" in text
    assert line(measured).endswith("floor 5 [2.00]")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_the_peak_of_each_product_is_measured(dtype: str) -> None:
    assert 0.1 < peak(dtype) < 1e5


def test_the_floor_is_the_integer_products_at_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.floor.peak", lambda dtype: 100.0)
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "add_pooling_layer": False}
    model = Model("tiny", "BertModel", tuple(config.items()), ((1, 8),))
    operations = 2 * 8 * (4 * 32 * 32 + 2 * 32 * 64)  # eight tokens through six layers; the pooler apart
    found = Floor("int8").milliseconds(model, model.inputs(1, 8), 2)
    assert found == pytest.approx(operations / (2 * 100e9) * 1e3, rel=0.1)
    assert Floor("bf16").milliseconds(model, model.inputs(1, 8), 2) is None


def test_a_line_follows_the_run() -> None:
    assert line(entry()) == (
        "bert 1x128 2 thr: tersor 10 (8); peer 20 (15) [2.00] cos 0.990000; broken failed: it does not start"
    )


@pytest.mark.parametrize("name", MODELS)
def test_inputs_fit_the_declared_axes(name: str) -> None:
    model = MODELS[name]
    batch, length = model.shapes[-1]
    inputs = model.inputs(batch, length)
    assert set(inputs) == set(model.dynamic_axes)
    others = model.calibration(inputs)
    assert all(other[key].shape == inputs[key].shape for other in others for key in inputs)
    assert any((others[0][key] != inputs[key]).any() for key in inputs)
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
    assert parse(["--recipe", "int8"]).engines == ["tersor", "openvino-int8", "openvino-int8-bf16", "torch"]
    assert all(peer in OTHERS for peers in BESIDE.values() for peer in peers)
    for wrong in (
        ["--recipe", "int3"],
        ["--models", "gpt5"],
        ["--shapes", "16"],
        ["--threads", "0"],
        ["--engines", "x"],
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "choose from" in capsys.readouterr().err
