"""A pass that works block by block, killed in the middle and run again, goes on with the next block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from tersor.ir import Program
from tersor.passes import Context, Pipeline
from tersor.passes.quantize import gptq
from tersor.passes.recover import bias, least_squares
from tests.passes.programs import Transformer

CUT = 8


def data(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [{"x": torch.randn(2, 16, 16, generator=generator) + 0.5} for _ in range(count)]


def model() -> Program:
    return Transformer(layers=3, mask=None).build()


def thinned() -> Program:
    """The model without a third of each feed-forward's neurons."""
    made = model()
    for layer in range(3):
        name = f"block.{layer}.ffn.down.weight"
        weight = made.parameters[name].tensor.clone()
        weight[:, :CUT] = 0
        made.parameters[name] = weight
    return made


PASSES = {
    "quantize.gptq": (gptq, "round_with_feedback", ["quantize.gptq"], model),
    "quantize.mixed": (
        gptq,
        "round_with_feedback",
        [{"pass": "quantize.mixed", "min_sqnr_db": 20, "weights": "gptq"}],
        model,
    ),
    "recover.bias": (bias, "_errors", [{"pass": "quantize.rtn", "bits": 4}, "recover.bias"], model),
    "recover.least_squares": (least_squares, "_solved", ["recover.least_squares"], thinned),
}


def run(steps, made: Program, folder):
    context = Context(cache=folder, reference=model())
    return Pipeline(steps).run(made, context, calibration=data())


@pytest.mark.parametrize("name", PASSES)
def test_a_killed_run_goes_on_with_the_next_block(name, tmp_path, monkeypatch):
    module, work, steps, make = PASSES[name]
    original, calls = getattr(module, work), []

    def counted(*args, **options):
        if len(calls) == deadline:
            raise KeyboardInterrupt
        calls.append(work)
        return original(*args, **options)

    monkeypatch.setattr(module, work, counted)
    deadline = None
    whole, report = run(steps, make(), tmp_path / "undisturbed")
    total = len(calls)
    assert total >= 18
    calls.clear()
    deadline = total // 2
    with pytest.raises(KeyboardInterrupt):
        run(steps, make(), tmp_path / "killed")
    calls.clear()
    deadline = None
    resumed, again = run(steps, make(), tmp_path / "killed")
    # what one layer needs may have been half done
    assert total - total // 2 <= len(calls) <= total - total // 2 + 8
    assert resumed.digest() == whole.digest()
    assert (again.steps[-1].changes, again.steps[-1].skips) == (
        report.steps[-1].changes,
        report.steps[-1].skips,
    )


def test_pieces_follow_from_the_pass_and_the_data(tmp_path, monkeypatch):
    calls = []
    original = gptq.round_with_feedback
    monkeypatch.setattr(gptq, "round_with_feedback", lambda *a, **o: calls.append(1) or original(*a, **o))

    def count(options=None, batches=None, seed=0):
        calls.clear()
        context = Context(cache=tmp_path, seed=seed)
        steps = [{"pass": "quantize.gptq", **(options or {})}]
        Pipeline(steps).run(model(), context, calibration=batches or data())
        return len(calls)

    assert count() == 18
    for entry in tmp_path.iterdir():  # the results of whole passes go, the pieces stay
        if entry.name not in ("pieces", "statistics"):
            for file in entry.iterdir():
                file.unlink()
            entry.rmdir()
    assert count() == 0
    assert count({"damp": 0.02}) == 18 and count(batches=data(7)) == 18 and count(seed=1) == 18
    for file in (tmp_path / "pieces").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert count({"damp": 0.03}) == 18 and count({"damp": 0.04, "skip": ["block.2.*"]}) == 12


SCRIPT = """
    import torch
    from tersor.passes import Context, Pipeline
    from tersor.passes.quantize import gptq
    from tests.passes.test_resume import data, model

    original, calls = gptq.round_with_feedback, []

    def slow(*args, **options):
        if len(calls) == {deadline}:
            print("stuck", flush=True)
            import time; time.sleep(600)
        calls.append(1)
        return original(*args, **options)

    gptq.round_with_feedback = slow
    torch.set_num_threads(1)
    after, _ = Pipeline(["quantize.gptq"]).run(model(), Context(cache={folder!r}), calibration=data())
    print(len(calls), after.digest(), flush=True)
"""


def script(folder, deadline: int, root) -> subprocess.Popen:
    code = textwrap.dedent(SCRIPT).format(folder=str(folder), deadline=deadline)
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_leaves_finished_blocks_behind(tmp_path, root):
    first = script(tmp_path, 8, root)
    try:
        assert first.stdout.readline() == "stuck\n"
        os.kill(first.pid, signal.SIGKILL)
    finally:
        first.kill()
        first.communicate()
    second = script(tmp_path, 99, root)
    calls, digest = second.communicate(timeout=120)[0].split()
    # the block in which it was killed begins anew
    assert int(calls) == 12
    whole, _ = Pipeline(["quantize.gptq"]).run(model(), calibration=data())
    assert digest == whole.digest()
