"""Compiled programs with state: sessions, updates in place, old values that are still needed."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tersor.codegen.compare import compare
from tersor.codegen.compiler import build, prepare
from tersor.codegen.lowering import lower
from tersor.codegen.runtime import Manifest, load
from tersor.codegen.runtime.manifest import _digest as manifest_digest
from tersor.errors import ArtifactError, BudgetError, InputError, TargetError
from tersor.ir import Program, Value, run
from tersor.targets import resolve
from tests.ir.stateful import ROOM, WIDTH, counter, decoder, f32

POSITION = Value("int64", ())


def compiled(program, folder, **options):
    build(prepare(program, resolve("native")), folder / "model.tersor", threads=1, **options)
    return load(folder / "model.tersor", threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return compiled(decoder(), tmp_path_factory.mktemp("decoder"))


def whole(x: np.ndarray) -> np.ndarray:
    function = decoder().functions["prefill"]
    return run(function, {"x": torch.from_numpy(x), "position": torch.tensor(0)})["y"].numpy()


def tokens(seed: int = 0, length: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, length, WIDTH)).astype(np.float32)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_prefill_and_decode(model):
    assert model.manifest.verified and set(model.manifest.errors) == {"prefill", "decode"}
    x, session = tokens(), model.session()
    parts = [session.prefill(x=x[:, :7], position=0)["y"]]
    parts += [session.decode(x=x[:, at : at + 1], position=at)["y"] for at in range(7, 10)]
    close(np.concatenate(parts, 1), whole(x))


def test_sessions_are_independent(model):
    inputs, sessions = [tokens(1), tokens(2)], [model.session(), model.session()]
    results = [[], []]
    for at in range(10):  # in turns
        for x, session, result in zip(inputs, sessions, results, strict=True):
            result.append(session.decode(x=x[:, at : at + 1], position=at)["y"])
    for x, result in zip(inputs, results, strict=True):
        close(np.concatenate(result, 1), whole(x))
    first, second = ({s.ctypes.data for s in session.states.values()} for session in sessions)
    assert not first & second and all(pointer % 64 == 0 for pointer in first | second)


def test_reset_starts_again(model):
    session, x = model.session(), tokens()
    before = session.prefill(x=x, position=0)["y"]
    assert session.states["0.key"].any()
    session.prefill(x=tokens(3), position=2)
    session.reset()
    assert not any(state.any() for state in session.states.values())
    np.testing.assert_array_equal(session.prefill(x=x, position=0)["y"], before)


def test_states_can_be_kept_and_put_back(model):
    session, x = model.session(), tokens()
    session.prefill(x=x[:, :9], position=0)
    kept = {name: state.copy() for name, state in session.states.items()}
    expected = session.decode(x=x[:, 9:], position=9)["y"]
    other = model.session()
    for name, state in kept.items():
        other.states[name][...] = state
    np.testing.assert_array_equal(other.decode(x=x[:, 9:], position=9)["y"], expected)


def test_torch_in_torch_out(model):
    x = torch.from_numpy(tokens())
    result = model.session().prefill(x=x, position=torch.tensor(0))["y"]
    assert isinstance(result, torch.Tensor)
    close(result.numpy(), whole(x.numpy()))


def test_a_state_too_small_is_said(model):
    session, x = model.session(), tokens(length=8)
    session.prefill(x=x, position=0)
    with pytest.raises(InputError, match=r"no room(.*\n)*.*0\.key: float32\[1, 12, 16\](.*\n)*.*reset"):
        session.prefill(x=x, position=5)
    with pytest.raises(InputError, match=r"failed half-way(.*\n)*.*session.reset\(\)"):
        session.decode(x=x[:, :1], position=0)
    session.reset()
    close(session.prefill(x=x, position=0)["y"], whole(x))
    with pytest.raises(InputError, match="no room"):
        session.decode(x=x[:, :1], position=-1)
    close(model.session().prefill(x=x, position=0)["y"], whole(x)), "other sessions go on"


def test_wrong_inputs_leave_the_session_alone(model):
    session, x = model.session(), tokens()
    session.prefill(x=x[:, :9], position=0)
    with pytest.raises(InputError, match="float64"):
        session.decode(x=x[:, 9:].astype(np.float64), position=9)
    with pytest.raises(InputError, match="missing"):
        session.decode(x=x[:, 9:])
    close(session.decode(x=x[:, 9:], position=9)["y"], whole(x)[:, 9:])


def test_calls_without_a_session_say_how(model):
    with pytest.raises(InputError, match=r"s = compiled.session\(\), then s.decode"):
        model.functions["decode"](x=tokens(length=1), position=0)
    with pytest.raises(InputError, match="no function 'main'.*(\n.*)*compiled.session"):
        model(x=tokens(), position=0)
    with pytest.raises(AttributeError, match="'generate'; the functions are prefill, decode"):
        model.session().generate(x=tokens())


def test_a_single_function_is_what_calling_runs(tmp_path):
    session = compiled(counter(), tmp_path).session()
    for calls in (1, 2, 3):
        np.testing.assert_array_equal(session(np.ones(3, np.float32))["y"], np.full(3, calls))
    with pytest.raises(InputError, match=r"session\(\)"):
        session.model(np.ones(3, np.float32))


def test_a_model_without_states_has_sessions_too(tmp_path):
    program = Program()
    function = program.add_function("main")
    function.set_outputs({"y": function.builder().mul(function.add_input("x", f32(3)), 2.0)})
    model = compiled(program, tmp_path)
    session = model.session()
    np.testing.assert_array_equal(session(np.ones(3, np.float32))["y"], model(np.ones(3, np.float32))["y"])
    assert not session.states
    session.reset()


def test_saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "again.tersor")
    again = load(tmp_path / "again.tersor", threads=1)
    assert again.manifest.states == model.manifest.states and "0.key" in again.manifest.states
    assert "states 0.key" in repr(again)
    x = tokens()
    close(again.session().prefill(x=x, position=0)["y"], whole(x))


def test_threads_on_sessions_of_their_own_and_on_one(model):
    results, shared = {}, model.session()
    x = tokens()
    shared.prefill(x=x[:, :9], position=0)

    def work(seed: int) -> None:
        own, mine = model.session(), tokens(seed)
        parts = [own.decode(x=mine[:, at : at + 1], position=at)["y"] for at in range(10)]
        # the same slice at the same place: any order of the calls gives the same
        results[seed] = np.concatenate(parts, 1), shared.decode(x=x[:, 9:], position=9)["y"]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(6):
        close(results[seed][0], whole(tokens(seed)))
        close(results[seed][1], whole(x)[:, 9:])


def test_benchmarks_start_each_call_afresh(tmp_path, model):
    result = model.functions["decode"].benchmark(calls=3)
    assert result.calls == 3 and "position scalar" in result.inputs
    assert model.functions["prefill"].benchmark(calls=2, dims={"length": ROOM}).calls == 2
    counting = compiled(_counted(), tmp_path)
    assert counting.benchmark(calls=20).calls == 20, "more calls than its state has room for"


def test_updates_are_in_place_where_they_can_be(model):
    lowered = lower(decoder(), resolve("native"))
    names = {kernel.name() for kernel in lowered.kernels}
    assert "cache_update" in names and "cache_update_of_copy" not in names
    assert not any(k.name().startswith("elementwise_copy") for k in lowered.kernels)


# -- programs in which something still needs the old value, or the new one does not come from cache_update


def _function(*states):
    program = Program()
    function = program.add_function("main")
    x, at = function.add_input("x", f32(1, 1, 8)), function.add_input("at", POSITION)
    return (
        program,
        function,
        x,
        at,
        [function.add_state(name, f32(1, 6, 8)) for name in states],
        function.builder(),
    )


def old_value_read_later():
    program, function, x, at, (k,), b = _function("k")
    new = b.cache_update(k, x, at, dim=1)
    moved = b.add(new, k)
    function.set_outputs({"y": b.sum(moved, dims=(1,))}, {"k": new})
    return program


def old_value_returned():
    program, function, x, at, (k,), b = _function("k")
    function.set_outputs(
        {"old": k, "flat": b.reshape(k, shape=(48,))}, {"k": b.cache_update(k, x, at, dim=1)}
    )
    return program


def new_value_returned():
    program, function, x, at, (k,), b = _function("k")
    new = b.cache_update(k, x, at, dim=1)
    function.set_outputs({"new": new, "flat": b.reshape(new, shape=(48,))}, {"k": new})
    return program


def old_value_fused_behind_the_update():
    program, function, x, at, (k,), b = _function("k")
    early = b.mul(k, 3.0)  # one kernel with what follows, which runs behind the update
    new = b.cache_update(k, x, at, dim=1)
    function.set_outputs({"y": b.sub(early, b.exp(b.neg(b.abs(new))))}, {"k": new})
    return program


def old_value_read_through_a_transposition():
    program, function, x, at, (k,), b = _function("k")
    turned = b.permute(k, dims=(0, 2, 1))  # which the product reads in place
    new = b.cache_update(k, x, at, dim=1)
    function.set_outputs({"y": b.matmul(b.add(new, 1.0), turned)}, {"k": new})
    return program


def states_change_places():
    program, function, x, at, (k, v), b = _function("k", "v")
    function.set_outputs({"y": b.sub(k, v)}, {"k": v, "v": b.cache_update(k, x, at, dim=1)})
    return program


def one_state_takes_the_old_value_of_another():
    program, function, x, at, (k, v), b = _function("k", "v")
    function.set_outputs({"y": b.mul(v, 2.0)}, {"k": b.cache_update(k, x, at, dim=1), "v": k})
    return program


def an_update_that_is_not_kept():
    program, function, x, at, (k,), b = _function("k")
    function.set_outputs({"y": b.sum(b.cache_update(k, x, at, dim=1), dims=(1,))})
    return program


def an_update_of_something_else():
    program, function, x, at, (k,), b = _function("k")
    other = b.cache_update(b.mul(k, 0.5), x, at, dim=1)
    function.set_outputs({"y": b.cache_update(b.expand(x, shape=(1, 6, 8)), x, at, dim=1)}, {"k": other})
    return program


def updates_of_updates():
    program, function, x, at, (k,), b = _function("k")
    first = b.cache_update(k, x, at, dim=1)
    between = b.sum(first, dims=(1,))
    second = b.cache_update(first, b.mul(x, 2.0), b.full(shape=(), value=1, dtype="int64"), dim=1)
    function.set_outputs({"y": between, "z": b.sum(second, dims=(1,))}, {"k": second})
    return program


def an_older_update_read_later():
    program, function, x, at, (k,), b = _function("k")
    first = b.cache_update(k, x, at, dim=1)
    second = b.cache_update(first, b.mul(x, 2.0), b.full(shape=(), value=1, dtype="int64"), dim=1)
    function.set_outputs({"y": b.sub(second, first)}, {"k": second})
    return program


def an_update_through_views():
    program, function, x, at, (k,), b = _function("k")
    flat = b.reshape(k, shape=(6, 8))
    new = b.reshape(b.cache_update(flat, b.reshape(x, shape=(1, 8)), at, dim=0), shape=(1, 6, 8))
    function.set_outputs({"y": b.mul(new, 2.0)}, {"k": new})
    return program


def a_state_that_is_replaced():
    program, function, x, at, (k,), b = _function("k")
    rolled = b.concat((b.slice(k, dim=1, start=1), x), dim=1)  # a window that slides
    function.set_outputs({"y": b.sum(rolled, dims=(1,))}, {"k": rolled})
    return program


def a_state_that_becomes_an_input():
    program, function, x, at, (k,), b = _function("k")
    wide = function.add_input("wide", f32(1, 6, 8))
    function.set_outputs({"y": b.add(k, x)}, {"k": wide})
    return program


def a_state_only_read():
    program, function, x, at, (k,), b = _function("k")
    function.set_outputs({"y": b.add(k, x)})
    return program


def _counted():
    program = Program()
    function = program.add_function("main")
    x, count = function.add_input("x", f32(1, 1, 8)), function.add_state("count", POSITION)
    k, b = function.add_state("k", f32(1, 6, 8)), function.builder()
    new = b.cache_update(k, x, count, dim=1)
    function.set_outputs({"y": b.sum(new, dims=(1,))}, {"k": new, "count": b.add(count, 1)})
    return program


HARD = [
    old_value_read_later, old_value_returned, new_value_returned, old_value_fused_behind_the_update,
    old_value_read_through_a_transposition, states_change_places, one_state_takes_the_old_value_of_another,
    an_update_that_is_not_kept, an_update_of_something_else, updates_of_updates, an_older_update_read_later,
    an_update_through_views, a_state_that_is_replaced, a_state_that_becomes_an_input, a_state_only_read, _counted,
]  # fmt: skip


@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_every_use_of_a_state_is_right(make, tmp_path):
    """The comparison runs one call on random states; here are several in a row, and results that are kept."""
    program = make()
    session, states = compiled(program, tmp_path).session(), program.zero_states()
    rng, seen = np.random.default_rng(0), []
    for at in (0, 3, 5, 3):
        inputs = {
            name: np.array(at) if value == POSITION else rng.standard_normal(value.shape, dtype=np.float32)
            for name, value in program.main.inputs.items()
        }
        expected = run(program.main, {n: torch.from_numpy(a) for n, a in inputs.items()}, states)
        seen.append((session(**inputs), expected))
        for name, state in states.items():
            np.testing.assert_allclose(session.states[name], state.numpy(), atol=1e-5)
    for outputs, expected in seen:  # later calls have not changed what was handed out
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value.numpy(), atol=1e-5)


# -- what the compiler refuses and notices


def test_wrong_states_are_noticed():
    function = decoder().functions["decode"]

    def forgets(inputs, states):
        return run(function, inputs, dict(states))

    with pytest.raises(BudgetError, match=r"output '\$0.key'"):
        compare(function, forgets)


def test_states_count_for_the_targets_memory(tmp_path):
    program = Program()
    function = program.add_function("main")
    x, k = function.add_input("x", f32(1, 1, 1024)), function.add_state("k", f32(1, 1 << 20, 1024))
    b = function.builder()
    function.set_outputs(
        {"y": x}, {"k": b.cache_update(k, x, b.full(shape=(), value=0, dtype="int64"), dim=1)}
    )
    with pytest.raises(TargetError, match="states"):
        compiled_for = replace(resolve("native"), memory=1 << 30)
        prepare(program, compiled_for)


@pytest.mark.parametrize("damage", ["shape", "dtype", "missing", "unlisted"])
def test_damaged_states_in_a_manifest(model, damage):
    body = json.loads(model.manifest.to_json())
    state = body["states"]["0.key"]
    if damage == "shape":
        state["shape"] = [1, "length", 16]
    elif damage == "dtype":
        state["dtype"] = "complex64"
    elif damage == "missing":
        del body["states"]
    else:
        del body["states"]["0.key"]
    del body["digest"]
    text = json.dumps({"digest": manifest_digest(body), **body})
    with pytest.raises(ArtifactError, match="states"):
        Manifest.from_json(text, "here")
