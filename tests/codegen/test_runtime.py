"""Running artifacts: right results, inputs checked, threads, and nothing loaded that is not needed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_harness import WIDTH, expected, inputs, manifest, weights, write

from tersor.codegen.runtime import BenchmarkResult, CompiledModel, Outputs, load, model, threads
from tersor.errors import ArtifactError, InputError

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("artifact") / "tiny.tersor")


@pytest.fixture
def compiled(artifact: Path) -> CompiledModel:
    return load(artifact, threads=1)


def run_clean(script: str, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Results


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 64), (4, 1), (4, 64), (3, 17)])
@pytest.mark.parametrize("count", [1, 2])
def test_every_size_is_right(compiled: CompiledModel, batch: int, length: int, count: int) -> None:
    if count > threads.available():
        pytest.skip("needs two CPUs")
    compiled.threads = count
    given = inputs(batch, length)
    out = compiled(**given)
    hidden = expected(**given)
    np.testing.assert_allclose(out["hidden"], hidden, **CLOSE)
    np.testing.assert_allclose(out["extra"][0], hidden.sum(-1).ravel(), **CLOSE)


def test_outputs_are_found_by_name_attribute_and_place(compiled: CompiledModel) -> None:
    given = inputs()
    out = compiled(**given)
    assert isinstance(out, Outputs)
    assert list(out) == ["hidden", "extra", "matrix"] and len(out) == 3
    assert out.hidden is out["hidden"] is out[0]
    assert out[-1] is out.matrix and len(out[:2]) == 2
    assert isinstance(out.extra, tuple) and len(out.extra) == 2
    assert out.extra[0] is out["extra.0"]
    assert out.extra[1].echo is out["extra.1.echo"] is out["extra.1"][0]
    np.testing.assert_array_equal(out.extra[1].echo, given["x"])
    assert "hidden=float32[2, 5, 8], extra.0=float32[10], extra.1.echo=float32[2, 5, 8]" in repr(out)
    assert copy.copy(out).hidden is out.hidden
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(out)).hidden, out.hidden)
    with pytest.raises(AttributeError, match="hiden.*hidden, extra"):
        _ = out.hiden
    with pytest.raises(KeyError):
        out["hiden"]


def test_positional_inputs(compiled: CompiledModel) -> None:
    given = inputs()
    np.testing.assert_allclose(compiled(*given.values()).hidden, expected(**given), **CLOSE)
    mixed = compiled(given["x"], scale=given["scale"], ids=given["ids"], mask=given["mask"])
    np.testing.assert_allclose(mixed.hidden, expected(**given), **CLOSE)


def test_torch_in_torch_out(compiled: CompiledModel) -> None:
    import torch

    given = inputs()
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}
    tensors["x"].requires_grad_()
    out = compiled(**tensors)
    assert isinstance(out.hidden, torch.Tensor)
    assert isinstance(out.extra[1]["echo"], torch.Tensor)
    np.testing.assert_allclose(out.hidden.numpy(), expected(**given), **CLOSE)
    assert isinstance(compiled(**{**tensors, "scale": 1.0}).hidden, torch.Tensor)


@pytest.mark.parametrize("how", ["unaligned", "strided", "read only", "big endian"])
def test_inputs_in_any_layout(compiled: CompiledModel, how: str) -> None:
    given = inputs()
    for name in ("x", "ids"):
        value = given[name]
        if how == "unaligned":
            raw = np.empty(value.nbytes + 8, np.uint8)[8:]
            given[name] = raw[: value.nbytes].view(value.dtype).reshape(value.shape)
            given[name][...] = value
        elif how == "strided":
            given[name] = np.repeat(value, 2, axis=1)[:, ::2]
        elif how == "read only":
            value.flags.writeable = False
        elif name == "ids":
            given[name] = value.astype(">i8")
    np.testing.assert_allclose(compiled(**given).hidden, expected(**given), **CLOSE)

    machine = compiled.functions["main"]._callers.vm
    passed: list[int] = []
    run = machine.run
    machine.run = lambda *tensors: (passed.extend(t.data_ptr() for t in tensors), run(*tensors))[1]
    compiled(**given)
    assert len(passed) == 4 and not any(pointer % 64 for pointer in passed)


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int8", "bool"])
def test_whole_numbers_are_widened(compiled: CompiledModel, dtype: str) -> None:
    given = inputs()
    given["ids"] = given["ids"].astype(dtype)
    np.testing.assert_allclose(
        compiled(**given).hidden, expected(**{**given, "ids": given["ids"].astype(np.int64)}), **CLOSE
    )


def test_numbers_for_scalars(compiled: CompiledModel) -> None:
    for scale in (2, 0.5, np.float32(3), np.array(0.25, np.float32)):
        given = inputs() | {"scale": scale}
        np.testing.assert_allclose(compiled(**given).hidden, expected(**given), **CLOSE)


def test_results_belong_to_the_caller(compiled: CompiledModel) -> None:
    first = inputs(seed=1)
    out = compiled(**first)
    kept = {"hidden": out.hidden.copy(), "echo": out.extra[1]["echo"].copy()}
    for seed in range(2, 6):
        compiled(**inputs(seed=seed))
    np.testing.assert_array_equal(out.hidden, kept["hidden"])
    np.testing.assert_array_equal(out.extra[1]["echo"], kept["echo"])

    out.extra[1]["echo"][...] = 9
    out.matrix[...] = 9
    np.testing.assert_array_equal(first["x"], inputs(seed=1)["x"])
    np.testing.assert_array_equal(compiled(**first).matrix, weights()["matrix"])
    np.testing.assert_allclose(compiled(**first).hidden, kept["hidden"], **CLOSE)


def test_results_outlive_the_model(artifact: Path) -> None:
    short_lived = load(artifact)
    given = inputs()
    out = short_lived(**given)
    del short_lived
    gc.collect()
    np.testing.assert_allclose(out.hidden, expected(**given), **CLOSE)


# Bad inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, r"missing input 'scale'.*\n.*the model takes x: float32\[batch, length, 8\]"),
        ({"Mask": np.ones((2, 5), bool), "mask": None}, "unexpected input 'Mask'.*\n.*\n.*mean 'mask'"),
        ({"extra": np.zeros(2)}, "unexpected input 'extra'"),
        ({"x": np.zeros((2, 5, WIDTH))}, r"'x' has dtype float64.*\n.*\n.*astype\('float32'\)"),
        ({"ids": np.zeros((2, 5), np.float32)}, "'ids' has dtype float32, the model takes int64"),
        ({"ids": np.zeros((2, 5), np.uint64)}, "'ids' has dtype uint64"),
        ({"mask": np.zeros((2, 5), np.int64)}, "'mask' has dtype int64"),
        ({"x": np.array([["a"]])}, "'x' has dtype <U1"),
        ({"x": [[1.0]]}, "'x' is a list"),
        ({"scale": "2"}, "'scale' is a str"),
        ({"scale": True + 0j}, "'scale' is a complex"),
        ({"x": np.zeros((5, WIDTH), np.float32)}, "'x' has 2 dimensions, the model takes 3"),
        ({"scale": np.zeros(1, np.float32)}, "'scale' has 1 dimensions, the model takes 0"),
        ({"x": np.zeros((2, 5, 9), np.float32)}, "axis 2 of input 'x' is 9, expected 8"),
        (
            {"mask": np.zeros((2, 6), bool)},
            "axis 1 of input 'mask' is 6, expected 5.*\n.*'length' is set by 'x' axis 1",
        ),
        (inputs(5, 3), r"dimension 'batch' is 5; .* 1 to 4.*\n.*axis 0 of input 'x'.*\n.*1\.\.5"),
        (inputs(1, 65), "dimension 'length' is 65; this artifact was compiled for 1 to 64"),
        (inputs(0, 3), "dimension 'batch' is 0"),
    ],
)
def test_bad_inputs_say_what_to_do(compiled: CompiledModel, changes: dict[str, Any], message: str) -> None:
    given = inputs() | changes
    with pytest.raises(InputError, match=message):
        compiled(**given)
    np.testing.assert_allclose(compiled(**inputs()).hidden, expected(**inputs()), **CLOSE)


def test_bad_positional_inputs(compiled: CompiledModel) -> None:
    values = list(inputs().values())
    with pytest.raises(InputError, match="5 inputs were given, 4 are expected"):
        compiled(*values, values[0])
    with pytest.raises(InputError, match="'x' is given twice"):
        compiled(*values, x=values[0])
    with pytest.raises(InputError, match="missing input 'mask', 'scale'"):
        compiled(*values[:2])


def test_torch_tensors_that_cannot_be_viewed(compiled: CompiledModel) -> None:
    import torch

    for tensor in (torch.zeros(2, 5, WIDTH, dtype=torch.bfloat16), torch.zeros(2, 5, WIDTH, device="meta")):
        with pytest.raises(InputError, match=r"(?s)'x'.*torch\.float32"):
            compiled(**inputs() | {"x": tensor})


# Threads


def test_eight_threads_call_one_model(compiled: CompiledModel) -> None:
    compiled.threads = None
    wrong: list[Exception | int] = []

    def work(seed: int) -> None:
        try:
            for turn in range(40):
                given = inputs(1 + (seed + turn) % 4, 1 + (7 * seed + turn) % 64, seed)
                out = compiled(**given)
                if not np.allclose(out.hidden, expected(**given), **CLOSE):
                    wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_threads_have_one_meaning(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available", lambda: 6)
    monkeypatch.delenv("TERSOR_NUM_THREADS", raising=False)
    chosen = load(write(tmp_path / "three.tersor", manifest=manifest(threads=3)))
    assert chosen.threads == 3
    assert load(write(tmp_path / "many.tersor", manifest=manifest(threads=60))).threads == 6
    assert load(artifact, threads=5).threads == 5
    monkeypatch.setenv("TERSOR_NUM_THREADS", "2")
    assert load(artifact).threads == load(tmp_path / "three.tersor").threads == 2
    assert load(artifact, threads=4).threads == 4
    chosen.threads = 6
    assert chosen.threads == 6
    chosen.threads = None
    assert chosen.threads == 2


@pytest.mark.parametrize("number", [0, -1, 7, 2.0, True, "many"])
def test_impossible_numbers_of_threads(
    compiled: CompiledModel, number: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "available", lambda: 6)
    with pytest.raises(InputError, match="from 1 to 6"):
        compiled.threads = number
    monkeypatch.setenv("TERSOR_NUM_THREADS", str(number))
    with pytest.raises(InputError, match="TERSOR_NUM_THREADS"):
        compiled.threads = None
    assert compiled.threads == 1


def test_the_number_of_threads_can_grow(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM cannot enlarge the pool of a thread, so the calls move to another one."""
    monkeypatch.setattr(threads, "available", lambda: 8)
    seen: list[tuple[int, int]] = []

    def count(*arguments: Any) -> list[np.ndarray]:
        seen.append((threads._functions()[1](), threading.get_ident()))
        return invoke(*arguments)

    function = compiled.functions["main"]
    invoke, function._invoke = function._invoke, count
    given = inputs()
    for number in (2, 1, 3, 5, 2, 4):
        compiled.threads = number
        np.testing.assert_allclose(compiled(**given).hidden, expected(**given), **CLOSE)
    # TVM's count with one thread is that of the idle pool.
    assert [n for n, _ in seen] == [2, 2, 3, 5, 2, 4]
    here = threading.get_ident()
    assert [place == here for _, place in seen] == [True, True, False, False, True, False]


def test_calls_work_in_a_forked_process(artifact: Path) -> None:
    script = """
import os, sys
import numpy as np
from tersor.codegen.runtime import load
model = load(sys.argv[1], threads=min(2, len(os.sched_getaffinity(0))))
given = dict(x=np.ones((2, 5, 8), "f4"), ids=np.ones((2, 5), int), mask=np.ones((2, 5), bool), scale=1.0)
before = model(**given).hidden
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(model(**given).hidden, before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.array_equal(model(**given).hidden, before)
print("equal")
"""
    assert run_clean(script, str(artifact)).split() == ["equal"]


def test_workers_stay_on_the_cpus_of_the_process(artifact: Path) -> None:
    # Two workers on one CPU: with as many CPUs as workers, wandering off them would go unnoticed.
    script = """
import os, sys
allowed = sorted(os.sched_getaffinity(0))[-1:]
os.sched_setaffinity(0, allowed)
import numpy as np
from tersor.codegen.runtime import load, threads
model = load(sys.argv[1])
assert model.threads == 1
threads.available = lambda: 3
model.threads = 3
before = len(os.listdir("/proc/self/task"))
model(x=np.ones((2, 5, 8), "f4"), ids=np.ones((2, 5), int), mask=np.ones((2, 5), bool), scale=1.0)
tasks = [int(task) for task in os.listdir("/proc/self/task")]
assert len(tasks) == before + 2, tasks
assert all(sorted(os.sched_getaffinity(task)) == allowed for task in tasks)
print("stayed")
"""
    assert run_clean(script, str(artifact)).split() == ["stayed"]


# What is loaded


def test_a_clean_process_loads_neither_torch_nor_the_compiler(artifact: Path) -> None:
    script = """
import sys
import numpy as np
from tersor.codegen.runtime import load
model = load(sys.argv[1])
out = model(x=np.ones((2, 5, 8), "f4"), ids=np.ones((2, 5), int), mask=np.ones((2, 5), bool), scale=1.0)
model.benchmark(calls=2)
modules = [name for name in ("torch", "tvm", "tersor.ir", "tersor.codegen.compiler") if name in sys.modules]
maps = open("/proc/self/maps").read()
libraries = [name for name in ("libtvm_compiler", "libtorch", "libtvm_runtime") if name in maps]
import torch  # importing it afterwards is still possible
print(out.hidden.shape, modules, libraries, sep=";")
"""
    assert run_clean(script, str(artifact)).strip() == "(2, 5, 8);[];['libtvm_runtime']"


def test_a_missing_runtime_is_an_error(artifact: Path) -> None:
    script = """
import importlib.util, sys
from tersor.errors import ArtifactError
from tersor.codegen.runtime import load
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "tvm" else find(name, package)
try:
    load(sys.argv[1])
except ArtifactError as error:
    print(error)
"""
    assert "TVM's runtime is missing" in run_clean(script, str(artifact))


# Benchmark, save, memory


def test_benchmark(compiled: CompiledModel) -> None:
    result = compiled.benchmark(calls=5)
    assert isinstance(result, BenchmarkResult)
    assert 0 < result.min <= result.median <= result.p90
    assert (result.calls, result.threads) == (5, 1)
    assert result.inputs == "x 2x5x8, ids 2x5, mask 2x5, scale scalar"
    assert "ms median" in str(result) and "5 calls, 1 thread;" in str(result)
    assert "x 3x64x8" in compiled.benchmark(calls=1, dims={"batch": 3, "length": 64}).inputs
    assert "x 1x2x8" in compiled.benchmark(inputs(1, 2), calls=1).inputs
    assert compiled.benchmark().calls >= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": {"width": 3}}, "no dimension 'width'.*\n.*batch"),
        ({"dims": {"batch": 9}}, "'batch' is 9"),
        ({"dims": {"batch": 1}, "inputs": inputs()}, "both given"),
        ({"inputs": {"x": np.zeros(3)}}, "missing input"),
        ({"calls": 0}, "calls=0"),
        ({"threads": 10_000}, "threads=10000"),
    ],
)
def test_benchmarks_that_cannot_be_run(
    compiled: CompiledModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compiled.benchmark(**arguments)
    assert compiled.threads == 1


def test_save_copies_a_temporary_artifact(artifact: Path, tmp_path: Path) -> None:
    short_lived = load(write(tmp_path / "build.tersor"), temporary=True)
    assert short_lived.save(tmp_path / "kept.tersor") == tmp_path / "kept.tersor"
    del short_lived
    gc.collect()
    assert os.listdir(tmp_path) == ["kept.tersor"]
    kept = load(tmp_path / "kept.tersor")
    np.testing.assert_allclose(kept(**inputs()).hidden, expected(**inputs()), **CLOSE)
    for file in artifact.iterdir():
        assert (tmp_path / "kept.tersor" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        kept.save(tmp_path / "kept.tersor", overwrite=False)
    kept.save(tmp_path / "kept.tersor")
    assert os.listdir(tmp_path) == ["kept.tersor"]


def test_memory_does_not_grow_with_the_number_of_sizes(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_KEPT", 20_000)
    compiled(**inputs(1, 1))
    machine = compiled.functions["main"]._callers.vm
    released: list[int] = []
    release = machine.release
    monkeypatch.setattr(machine, "release", lambda: (released.append(1), release()))
    for length in range(1, 65):
        given = inputs(4, length)
        np.testing.assert_allclose(compiled(**given).hidden, expected(**given), **CLOSE)
        assert sum(machine.sizes) <= 20_000 or len(machine.sizes) == 1
    assert released
    count = len(released)
    for _ in range(10):
        compiled(**inputs(4, 64))
    assert len(released) == count


def test_repr_shows_how_to_call(compiled: CompiledModel) -> None:
    text = repr(compiled)
    assert "target='x86-64-v3', threads=1" in text
    assert "x: float32[batch, length, 8]" in text
    assert "length from 1 to 64" in text
