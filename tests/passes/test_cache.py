"""Results are kept on disk, and taken from there only when they follow from the same things."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError

from tersor.errors import InputError, PipelineError
from tersor.passes import Context, Equivalent, Lossy, Pass, PassResult, Pipeline, cache, facts
from tersor.passes.cache import StepCache, source_digest
from tersor.passes.calibration import batches, store
from tests.passes.programs import Transformer

PASSES = ["fold.norm_beta", "fold.key_bias", "fold.zero_heads", "fold.norm_gamma", "cleanup.dead_code"]


def run(made, folder, passes=PASSES, **context):
    return Pipeline(passes).run(made, Context(cache=folder, **context))


@pytest.fixture
def made():
    return Transformer(layers=2, dead_heads=((1,),)).build()


def test_a_second_run_takes_everything_from_the_cache_and_gives_the_same(made, tmp_path):
    first, report = run(made, tmp_path)
    assert not any(step.cached for step in report.steps)
    second, again = run(made, tmp_path)
    assert all(step.cached for step in again.steps)
    assert second.digest() == first.digest()
    assert [n.meta.get("site") for n in second.main.nodes] == [n.meta.get("site") for n in first.main.nodes]
    assert list(second.parameters) == list(first.parameters)
    for one, other in zip(report.steps, again.steps, strict=True):
        other.cached = False
        assert one == other


def test_a_run_that_was_killed_resumes(made, tmp_path):
    class Die(Pass):
        """Stands for a power cut."""

        def run(self, program, context):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, [*PASSES[:3], Die()])
    _, report = run(made, tmp_path)
    assert [step.cached for step in report.steps] == [True, True, True, False, False]


def test_only_new_parameters_are_stored(made, tmp_path):
    run(made, tmp_path)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert stored < 2 * made.parameters.bytes


@pytest.mark.parametrize("change", ["weight", "site", "option", "seed", "source"])
def test_whatever_a_result_follows_from_changes_the_key(made, tmp_path, change, monkeypatch):
    run(made, tmp_path, ["fold.key_bias"])
    passes, context = ["fold.key_bias"], {}
    if change == "weight":
        made.parameters["block.1.ffn.up.bias"] = made.parameters["block.1.ffn.up.bias"].tensor + 1
    elif change == "site":
        made.main.calls("attention")[0].meta["site"] = "other"
    elif change == "option":
        passes = [{"pass": "fold.key_bias", "skip": ["block.0.*"]}]
    elif change == "seed":
        context = {"seed": 1}
    else:
        monkeypatch.setattr("tersor.passes.cache.source_digest", lambda cls: "edited")
    _, report = run(made, tmp_path, passes, **context)
    assert not report.steps[0].cached


def test_a_damaged_entry_is_computed_again(made, tmp_path):
    run(made, tmp_path, ["fold.norm_beta"])
    (file,) = tmp_path.rglob("parameters.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(bytes(data))
    after, report = run(made, tmp_path, ["fold.norm_beta"])
    assert not report.steps[0].cached and report.steps[0].modified


def test_a_failed_pass_leaves_nothing_behind(made, tmp_path):
    class Wrong(Pass):
        """Is not what it declares."""

        numerics = Equivalent()

        def run(self, program, context):
            program.parameters["block.0.ffn.up.bias"] = torch.ones(24)
            return PassResult()

    with pytest.raises(PipelineError):
        run(made, tmp_path, [Wrong()])
    assert not list(tmp_path.iterdir())


def test_passes_that_work_with_recorded_facts_are_not_cached(made, tmp_path):
    facts.recorded_fact("toy.seen", "something was seen")
    try:

        class See(Pass):
            """Records it."""

            provides = {"toy.seen"}
            numerics = Lossy()

            def run(self, program, context):
                context.records.put("toy.seen", program)
                return PassResult()

        for _ in range(2):
            _, report = run(made, tmp_path, [See()])
            assert not report.steps[0].cached
    finally:
        del facts._table["toy.seen"]


def test_a_pass_without_source_is_not_cached(made, tmp_path):
    scope = {"Pass": Pass, "PassResult": PassResult, "__name__": "nowhere"}
    exec("class Typed(Pass):\n    def run(self, program, context):\n        return PassResult()", scope)
    assert source_digest(scope["Typed"]) is None
    run(made, tmp_path, [scope["Typed"]()])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_what_is_kept_and_not_the_run(made, tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in (cache, store, batches):
        monkeypatch.setattr(module, "save_file", full)
    data = {"x": torch.randn(2, 8, 16), "mask": torch.ones(2, 1, 1, 8, dtype=torch.bool)}
    steps = ["fold.key_bias", "quantize.rtn", "quantize.static"]
    after, report = Pipeline(steps).run(made, Context(cache=tmp_path), calibration=[data])
    assert after.main.calls("quantize") and "was not cached" in report.steps[0].notes[0]
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    with pytest.raises(InputError, match="cannot be kept on disk"):
        Pipeline(steps).run(made, calibration=iter([data]))


def test_a_cache_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use the cache folder"):
        StepCache(tmp_path / "file" / "inside")
