"""The front door: one call from a model to native code, and what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor.errors import (
    ArtifactError,
    BudgetError,
    CaptureError,
    InputError,
    PipelineError,
    TargetError,
)
from tersor.ir import Dim, Program, Range, Value, ops, register_op

transformers = pytest.importorskip("transformers")

REPOSITORY = Path(__file__).parents[2]
BATCH, LENGTH = ("batch", 1, 4), ("length", 1, 32)
TEXT = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: LENGTH}}
SIZES = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=100)


def text(batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 100, (batch, length)), "attention_mask": mask}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def compiled(bert):
    return tersor.compile(bert, text(), dynamic=TEXT, threads=1)


def test_kinds_and_names_are_the_models_own(bert, compiled):
    given = text()
    as_torch, as_numpy = compiled(**given), compiled(**{k: v.numpy() for k, v in given.items()})
    assert list(as_torch) == ["last_hidden_state", "pooler_output"]
    assert isinstance(as_torch.pooler_output, torch.Tensor) and isinstance(as_numpy[1], np.ndarray)
    np.testing.assert_array_equal(as_torch["last_hidden_state"].numpy(), as_numpy.last_hidden_state)


def test_saved_and_loaded_again(compiled, tmp_path):
    compiled.save(tmp_path / "bert.tersor")
    again, given = tersor.load(tmp_path / "bert.tersor", threads=1), text(1, 9)
    assert torch.equal(again(**given).pooler_output, compiled(**given).pooler_output)
    assert again.benchmark(calls=3).calls == 3
    assert again.signature.example == {"batch": 2, "length": 16}
    assert "input_ids 2x16" in again.benchmark(calls=3).inputs


def test_eight_threads_call_one_model(compiled):
    inputs = [text(1 + i % 4, 5 + 3 * i) for i in range(8)]
    expected = [compiled(**given).last_hidden_state for given in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(compiled(**inputs[i]).last_hidden_state, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g | {"input_ids": g["input_ids"][0]}, "input_ids"),
        (lambda g: g | {"input_ids": g["input_ids"].float()}, "int64"),
        (lambda g: g | {"inputs_ids": g["input_ids"]}, "inputs_ids"),
        (lambda g: {"input_ids": g["input_ids"]}, "attention_mask"),
        (lambda g: text(2, 33), "length"),
        (lambda g: g | {"attention_mask": g["attention_mask"][:, :3]}, "length"),
    ],
    ids=["rank", "dtype", "name", "missing", "bound", "disagreement"],
)
def test_bad_inputs_are_named(compiled, change, says):
    with pytest.raises(InputError, match=says):
        compiled(**change(text()))


def test_a_nan_in_a_weight_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].weight.data[1, 2] = float("nan")
    with pytest.raises(InputError, match="0.weight"):
        tersor.compile(model, (torch.randn(2, 4),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("recipe", "tolerance"), [("fp32", 1e-6), ("int8", 0.05), ("bf16", 0.02)])
def test_a_model_in_half_precision_is_computed_in_more(dtype, recipe, tolerance):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    ).to(dtype)
    data = [(torch.randn(2, 8).to(dtype),) for _ in range(4)]
    given = {"calibration": data} if recipe == "int8" else {}
    compiled = tersor.compile(model, data[0], recipe=recipe, **given)
    assert next(model.parameters()).dtype == dtype, "the model itself is left alone"
    x = data[1][0].float()
    with torch.no_grad():
        expected = model.float()(x)
    torch.testing.assert_close(torch.as_tensor(compiled(x)["output"]), expected, rtol=0, atol=tolerance)


def test_a_model_in_training_mode_is_compiled_as_it_evaluates_and_left_as_it_is():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train(), torch.randn(2, 4)
    compiled = tersor.compile(model, x, threads=1)
    assert model.training and model[1].training
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], model.eval()(x))


def test_an_unknown_target_fails_before_any_work(bert):
    with pytest.raises(TargetError, match="x86-64-v3"):
        tersor.compile(bert, text(), target="x86-64-v33")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"threads": 0}, InputError, "threads=0"),
        ({"threads": 1 << 20}, InputError, "threads=1048576"),
        ({"threads": True}, InputError, "threads=True"),
        ({"tune_minutes": -1}, InputError, "tune_minutes is -1"),
        ({"tune_minutes": "5"}, InputError, "tune_minutes is '5'"),
        ({"recipe": "fp23"}, PipelineError, "fp32"),
        ({"recipe": None}, PipelineError, "NoneType"),
        ({"recipe": "missing.toml"}, PipelineError, "missing.toml"),
        ({"recipe": "int8", "calibration": "missing"}, InputError, "'missing' is no folder"),
        ({"recipe": "int8", "calibration": 3}, InputError, "calibration data is a int"),
        ({"output": "missing/model.tersor"}, ArtifactError, "does not exist"),
        ({"output": __file__}, ArtifactError, "will not overwrite"),
        ({"output": Path(__file__).parent}, ArtifactError, "will not overwrite"),
        ({"output": 3}, ArtifactError, "path of a folder"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_explained_before_any_work(options, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says) as caught:
        tersor.compile(None, **options)  # what is wrong with the model would be said later
    assert caught.value.fix and not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(ArtifactError, match="may write to"):
        tersor.compile(None, output=tmp_path / "model.tersor")


def test_too_little_memory_is_said_before_compiling(bert):
    small = tersor.Target(
        "board", "x86_64", features=frozenset({"avx2"}), memory=1 << 16, sources={"memory": "test"}
    )
    with pytest.raises(TargetError, match="board"):
        tersor.compile(bert, text(), target=small)


def test_nothing_is_left_when_the_disk_is_full(compiled, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        with pytest.raises(tersor.TersorError):
            compiled.save(folder / "bert.tersor")
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["umount", folder], check=True)


def test_wrong_code_is_noticed(tmp_path):
    """An operation whose decomposition is not what its reference computes cannot pass the comparison."""
    if "test.liar" not in ops:
        register_op("test.liar", lambda x: x + 1, decompose=lambda build, x: build.add(x, 1.001))
    program = Program()
    function = program.add_function("main", {"n": Range(1, 8)})
    x = function.add_input("x", Value("float32", (Dim.symbol("n"),)))
    function.set_outputs({"y": function.builder().emit("test.liar", x)})
    with pytest.raises(BudgetError, match="'y'"):
        tersor.compile(program, output=tmp_path / "model.tersor")
    assert not list(tmp_path.iterdir())


def test_the_same_program_gives_the_same_bytes(bert, tmp_path):
    program = tersor.capture(bert, text())
    for name in ("a.tersor", "b.tersor"):
        tersor.compile(program, output=tmp_path / name, threads=1)
    for file in ("module.so", "weights.safetensors"):  # the report, and so its hash, holds times
        assert (tmp_path / "a.tersor" / file).read_bytes() == (tmp_path / "b.tersor" / file).read_bytes(), (
            file
        )


def test_both_instruction_sets(bert):
    given = text()
    with torch.no_grad():
        expected = bert(**given).last_hidden_state
    for target in ("x86-64-v3", "native"):
        actual = tersor.compile(bert, given, target=target, threads=1)(**given).last_hidden_state
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max(), target


def plant_zeros(model: torch.nn.Module, heads: int, group: int = 1) -> None:
    """Zero output columns for more heads and neurons in each further layer; ``group`` heads go together."""
    if hasattr(model, "encoder"):
        layers = [(x.attention.output.dense, x.output.dense) for x in model.encoder.layer]
    else:
        layers = [(x.self_attn.o_proj, x.mlp.down_proj) for x in model.model.layers]
    for index, (projection, down) in enumerate(layers):
        size = projection.in_features // heads
        projection.weight.data[:, : index * group * size] = 0
        down.weight.data[:, : 7 * index] = 0


def llama(layers: int):
    sizes = SIZES | {"num_attention_heads": 8, "num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=4)), 8, 2


def encoder(layers: int):
    return transformers.BertModel(transformers.BertConfig(**SIZES | {"num_hidden_layers": layers})), 4, 1


@pytest.mark.parametrize("make", [encoder, llama], ids=lambda f: f.__name__)
def test_planted_zeros_are_removed(make, tmp_path):
    torch.manual_seed(0)
    model, heads, group = make(3)
    plant_zeros(model.eval(), heads, group)
    given = text()
    program = tersor.capture(model, given)
    whole = tersor.compile(program, recipe="none", output=tmp_path / "whole.tersor", threads=1)
    small = tersor.compile(program, recipe="fp32", output=tmp_path / "small.tersor", threads=1)
    for expected, actual in zip(whole(**given).values(), small(**given).values(), strict=True):
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)

    def weights(name: str) -> int:
        return os.path.getsize(tmp_path / name / "weights.safetensors")

    assert weights("small.tersor") < weights("whole.tersor")
    folded, _ = tersor.Pipeline(["fold.zero_heads", "fold.zero_neurons"]).run(program)
    removed = [n.kwargs["heads"] for n in folded.main.calls("attention")]
    assert removed == [heads - group * i for i in range(3)]
    widths = {n.meta["value"].shape[-1] for n in folded.main.calls("linear")}
    assert {96, 89, 82} <= widths


@pytest.mark.parametrize("make", [encoder, llama], ids=lambda f: f.__name__)
def test_eight_bits_with_scales_found_at_run_time(make, tmp_path):
    torch.manual_seed(0)
    model = make(1)[0].eval()
    given = text()
    compiled = tersor.compile(
        model, given, dynamic=TEXT, recipe="int8-dynamic", output=tmp_path / "a.tersor", threads=1
    )
    assert compiled.manifest.verified
    with torch.no_grad():
        expected = model(**given)[0]
    actual = compiled(**given)[0]
    seen = given["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(actual[seen], expected[seen], dim=-1).min() > 0.99
    products = [
        p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in products)
    stored = os.path.getsize(tmp_path / "a.tersor" / "weights.safetensors")
    assert stored < 4 * others + 1.5 * sum(p.numel() for p in products) + 20_000


def test_every_mistake_of_a_pipeline_is_listed(bert):
    with pytest.raises(PipelineError) as caught:
        tersor.compile(bert, text(), recipe=["fold.zero_heads", "nonsense"])
    assert "nonsense" in str(caught.value)


def test_an_unsupported_operator_is_reported_with_its_place():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x) + torch.linalg.det(x)

    with pytest.raises(CaptureError) as caught:
        tersor.compile(Odd(), (torch.randn(4, 4),))
    assert "bessel_j0" in str(caught.value) and "det" in str(caught.value)
    assert Path(__file__).name in str(caught.value)


PLUGIN = """
import torch, tersor
from tersor_squash.op import torch_squash  # as the user's own model would

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return torch.ops.tersor_squash.squash(self.down(torch.nn.functional.gelu(self.up(x))), bound=0.1)

torch.manual_seed(0)
model, x = Model().eval(), torch.randn(3, 8)
compiled = tersor.compile(model, (x,), threads=1)
with torch.no_grad():
    assert torch.allclose(compiled(x)[0], model(x), atol=1e-6)
squashed = tersor.compile(model, (x,), recipe=["tersor_squash.activations"], threads=1)
assert not torch.allclose(squashed(x)[0], compiled(x)[0], atol=1e-3)
print("both compile")
"""


def test_an_installed_package_adds_an_operation_and_a_pass(tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*install, "--target", tmp_path, REPOSITORY / "examples" / "plugin"], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", PLUGIN], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert "both compile" in result.stdout, result.stderr


def test_a_stage_that_costs_too_much_is_taken_back(bert):
    from tersor.passes import Budget, Lossy, Pass, PassResult, Stage, passes, register

    if "test.drop_activations" not in passes():

        @register("test.drop_activations")
        class DropActivations(Pass):
            """gelu(x)  ->  x"""

            numerics = Lossy()
            acts_on = ("gelu",)

            def run(self, program, context):
                result = PassResult()
                for function, node in self.select(program):
                    result.change(node, "dropped")
                    function.replace(node, node.args[0])
                return result

    held_out = [text(2, 8)]
    stage = Stage("drop", ("test.drop_activations",), Budget(min_sqnr_db=60.0, must_gain=False))
    compiled = tersor.compile(bert, text(), dynamic=TEXT, recipe=[stage], evaluation=held_out, threads=1)
    with torch.no_grad():
        expected = bert(**held_out[0]).last_hidden_state
    assert (compiled(**held_out[0]).last_hidden_state - expected).abs().max() < 1e-4
    assert "revert" in str(compiled.report)


def test_calibration_data_reaches_the_passes_and_a_second_run_resumes(bert, tmp_path):
    arguments = {"dynamic": TEXT, "threads": 1, "verify": False, "cache": tmp_path}
    torch.manual_seed(1)
    batches = [text(4, 12) for _ in range(4)]
    for cached in (False, True):
        made = tersor.compile(bert, text(), recipe=["smooth.smoothquant"], calibration=batches, **arguments)
        (step,) = made.report["steps"]
        assert step["cached"] is cached and (step["changes"] or step["skips"])
    given = text()
    with torch.no_grad():
        torch.testing.assert_close(
            made(**given).last_hidden_state, bert(**given).last_hidden_state, atol=1e-4, rtol=0
        )


# -- analysis


def test_a_model_is_analyzed_like_its_program(bert):
    torch.manual_seed(1)
    batches = [text(4, 12) for _ in range(4)]
    only = ["*.layer.0.intermediate.*", "*.layer.0.output.*"]
    options = {"calibration": batches, "only": only, "schemes": ("int8",)}
    found = tersor.analyze(bert, text(), dynamic=TEXT, latency=False, **options)
    assert isinstance(found, tersor.Analysis) and len(found) == 2
    program = tersor.capture(bert, text(), TEXT)
    steps = []
    timed = tersor.analyze(program, progress=steps.append, **options)
    assert timed.to_json()["sites"][0]["outcomes"] == found.to_json()["sites"][0]["outcomes"]
    assert all(0 < row.latency_share < 1 for row in timed.sites) and "timing" in steps


def test_an_analysis_without_data_is_refused_before_any_work(bert):
    with pytest.raises(InputError, match="needs calibration data"):
        tersor.analyze(bert, text(), progress=lambda step: pytest.fail(f"{step} was done"))
    with pytest.raises(InputError, match="signature already"):
        tersor.analyze(tersor.capture(bert, text()), text(), calibration=[text()])
