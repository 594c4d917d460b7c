"""A small run of each fuzzer, the same cases every time; and that the fuzzers notice what they are there for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from benchmarks.fuzz.__main__ import main  # noqa: E402
from benchmarks.fuzz.case import GOOD, Outcome, judged  # noqa: E402
from benchmarks.fuzz.compare import disagreement, spread  # noqa: E402
from benchmarks.fuzz.files import Files  # noqa: E402
from benchmarks.fuzz.graphs import Graphs  # noqa: E402
from benchmarks.fuzz.journal import Journal  # noqa: E402
from benchmarks.fuzz.originals import originals  # noqa: E402
from benchmarks.fuzz.peer import compare_with_onnxruntime  # noqa: E402
from benchmarks.fuzz.soups import Soups  # noqa: E402
from benchmarks.fuzz.summary import Summary  # noqa: E402
from benchmarks.fuzz.watch import Watch  # noqa: E402
from benchmarks.fuzz.worker import Result, Worker, run_here  # noqa: E402
from tersor import frontends  # noqa: E402
from tersor.ir import Program, Value  # noqa: E402


@settings(max_examples=35)
@given(st.randoms(use_true_random=False))
def test_random_programs_compile_to_what_they_mean(rng):
    outcome = Graphs().program(rng, lambda stage: None)
    assert outcome.kind in GOOD, outcome.detail


@pytest.fixture(scope="module")
def soups() -> Soups:
    return Soups()


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_soups_of_operators(soups, start):
    outcomes = [judged(soups, random.Random(seed)) for seed in range(start, start + 20)]
    assert [o for o in outcomes if o.kind not in GOOD] == []
    assert {"right", "refused"} <= {o.kind for o in outcomes}


@pytest.mark.parametrize(("end", "label"), [(0, "onnxruntime contradicts the file"), (2, "")])
def test_only_onnxruntimes_own_fault_with_empty_tensors_is_passed_over(end, label):
    graph = helper.make_graph(
        [
            helper.make_node("Slice", ["x", "start", "end"], ["part"]),
            helper.make_node("ArgMin", ["part"], ["y"], axis=-1),
        ],
        "least",
        [helper.make_tensor_value_info("x", TensorProto.INT32, [3, 5, 2])],
        [helper.make_empty_tensor_value_info("y")],
        [helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in (("start", 0), ("end", end))],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    made = onnx.shape_inference.infer_shapes(made)
    outcome = compare_with_onnxruntime(made.SerializeToString(), frontends.capture(made), lambda stage: None)
    assert outcome == Outcome("unchecked" if label else "right", label)


def _least(of: str) -> onnx.ModelProto:
    nodes = [helper.make_node(of, ["x"], ["z"]), helper.make_node("ReduceMin", ["z"], ["y"], keepdims=0)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [3]), ("y", [])))
    graph = helper.make_graph(nodes, "least", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize(
    ("x", "ours", "kind"),
    [
        ([1.0, 4.0, 9.0], "Sqrt", "right"),
        ([4.0, -1.0, 9.0], "Sqrt", "unchecked"),  # 2 in onnxruntime, NaN elsewhere
        ([4.0, 9.0, 9.0], "Abs", "wrong"),
    ],
)
def test_only_onnxruntimes_own_order_of_nan_is_passed_over(x, ours, kind):
    made = _least("Sqrt").SerializeToString()
    outcome = compare_with_onnxruntime(
        made, frontends.capture(_least(ours)), lambda stage: None, lambda *_: {"x": torch.tensor(x)}
    )
    assert outcome.kind == kind


@pytest.mark.parametrize(("x", "kind"), [(-5.5, "right"), (-4.0, "wrong")])
def test_a_comparison_is_decided_by_what_a_kernel_may_round_away(x, kind):
    program = Program()
    function = program.add_function("main")
    build = function.builder()
    function.set_outputs({"y": build.le(0.0, build.gelu(function.add_input("x", Value("float32", (2,)))))})
    expected, slack = spread(function, {"x": torch.tensor([1.0, x])})
    assert expected["y"].tolist() == [True, False]  # gelu(-5.5) is -1e-7, and 0 in our kernel
    wrong = disagreement({"y": torch.tensor([True, True])}, expected, slack)
    assert (wrong is None) == (kind == "right")


@pytest.fixture(scope="module")
def files() -> Files:
    return Files(originals(exported=False))


@pytest.mark.parametrize("start", range(0, 100, 20))
def test_damaged_files(files, start):
    results = [run_here(files, seed) for seed in range(start, start + 20)]
    assert [r for r in results if r.outcome.kind not in GOOD] == []
    assert {"refused"} < {r.outcome.kind for r in results}


def test_reads_outside_a_folder_are_seen(tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "secret.bin"
    folder.mkdir()
    (folder / "data").write_bytes(b"1")
    canary.write_bytes(b"2")
    with Watch(folder, (canary,)) as watch:
        (folder / "data").read_bytes()
        Path(json.__file__).read_bytes()
    assert watch.seen == []
    with Watch(folder) as watch:
        canary.read_bytes()
    assert watch.seen == [f"open {str(canary)!r}"]
    (folder / "link").symlink_to(canary)
    with Watch(folder) as watch:
        (folder / "link").read_bytes()
    assert len(watch.seen) == 1


def test_reads_by_foreign_code_are_seen(tmp_path):
    onnx = pytest.importorskip("onnx.onnx_cpp2py_export")
    canary = tmp_path / "secret.bin"
    canary.write_bytes(b"2")
    (tmp_path / "model").mkdir()
    with Watch(tmp_path / "model", (canary,)) as watch:
        with pytest.raises(Exception):  # noqa: B017  (whatever the checker thinks of a file that is no model)
            onnx.checker.check_model_path(str(canary), False, False, False)
    assert len(watch.seen) == 1 and "inotify" in watch.seen[0]


def test_what_happens_to_a_worker_is_the_outcome(tmp_path):
    worker = Worker("tests.benchmarks.broken_part:Broken")
    try:
        outcomes = [worker.run(seed).outcome for seed in range(6)]
    finally:
        worker.stop()
    assert [o.kind for o in outcomes] == ["crashed", "hung", "memory", "untyped error", "refused", "right"]
    assert outcomes[0].label == "doing it: SIGSEGV"
    assert "ZeroDivisionError" in outcomes[3].detail and outcomes[4].label == "InputError"


def test_journal_survives_a_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add(Result(3, Outcome("right"), 0.1, 5))
    path.write_text(path.read_text() + '{"seed": 4, "outc')
    again = Journal(path)
    assert list(again.results) == [3]
    again.add(Result(4, Outcome("wrong", "captured", "why"), 0.1, 5))
    assert Journal(path).results[4].outcome.detail == "why"


def test_summary_names_defects_with_their_command(tmp_path):
    results = [
        Result(1, Outcome("right"), 1.0, 1 << 20),
        Result(2, Outcome("crashed", "compiling: SIGSEGV"), 2.0, 0),
    ]
    summary = Summary("graphs", "the command", "today", {"cpu": "some"}, results)
    json_path, markdown = summary.write(tmp_path)
    data = json.loads(json_path.read_text())
    assert data["counts"]["crashed"] == {"compiling: SIGSEGV": 1} and data["peak_memory_mib"] == 1
    assert "python -m benchmarks.fuzz graphs --seed 2 --count 1" in markdown.read_text()


def test_the_command(tmp_path, capsys):
    arguments = ["soups", "--count", "3", "--journal", str(tmp_path / "journal"), "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert len(Journal(tmp_path / "journal").results) == 3
    assert json.loads((tmp_path / "fuzz-soups.json").read_text())["cases"] == 3
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nothing"])
