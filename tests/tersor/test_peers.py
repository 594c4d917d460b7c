"""Engines in their own processes, and the turns they take."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tersor.peers import EngineError, Folder, Worker, race
from tersor.peers.worker import Turn

ENGINE = """
import os
import numpy as np

class Engine:
    version = "test 1.0"

    def __init__(self, threads):
        self.threads = threads

    def load(self, source, inputs):
        if source == "bad":
            raise ValueError("cannot load this")
        if source == "crash":
            os._exit(7)
        return lambda: inputs["x"] * self.threads + len(os.sched_getaffinity(0))
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine in a module that a spawned process can import."""
    (tmp_path / "engine_for_test.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "engine_for_test:Engine"


def test_a_worker_is_bound_to_its_cpus_and_times_calls(engine: str) -> None:
    with Worker(engine, 1) as worker:
        seconds, version = worker.load("model", {"x": np.array([1.0, 2.0])})
        assert seconds >= 0 and version == "test 1.0"
        np.testing.assert_array_equal(worker.output(), [2.0, 3.0])  # one thread, on one CPU
        turn = worker.turn(1, 4)
        assert len(turn.milliseconds) == 4 and min(turn.milliseconds) >= 0


def test_a_failing_engine_says_why_and_can_go_on(engine: str) -> None:
    with Worker(engine, 1) as worker:
        with pytest.raises(EngineError, match="ValueError: cannot load this"):
            worker.load("bad", {})
        worker.load("model", {"x": np.zeros(1)})
        assert worker.output().shape == (1,)


def test_the_end_of_a_process_is_noticed(engine: str) -> None:
    with Worker(engine, 1) as worker, pytest.raises(EngineError, match="exit code 7"):
        worker.load("crash", {})


class Fake:
    """A worker without a process: writes into a shared log when it has a turn."""

    def __init__(
        self, name: str, log: list[str], output: np.ndarray, milliseconds: float = 1.0, fails: bool = False
    ):
        self.name, self.log, self.result, self.milliseconds, self.fails = (
            name,
            log,
            output,
            milliseconds,
            fails,
        )

    def load(self, source: object, inputs: object) -> tuple[float, str]:
        if self.fails:
            raise EngineError("no such thing")
        return 0.5, f"{self.name} 1.0"

    def turn(self, untimed: int, timed: int) -> Turn:
        if timed > 1:
            self.log.append(self.name)
        return Turn([self.milliseconds] * timed, 0.25)

    def output(self) -> np.ndarray:
        return self.result


def test_engines_take_turns_in_rotating_order() -> None:
    log: list[str] = []
    output = np.array([1.0, 2.0])
    workers = {name: Fake(name, log, output) for name in ("a", "torch", "b")}
    found = race(workers, None, {}, calls=7)
    assert [m.engine for m in found] == ["a", "torch", "b"]
    assert all(len(m.milliseconds) == 9 for m in found)  # three rounds of three reach seven
    assert sorted(log[:3]) == sorted(log[3:6]) == sorted(log[6:9]) == ["a", "b", "torch"]
    assert len({log[0], log[3], log[6]}) == 3


def test_outputs_are_compared_with_the_reference_at_its_scale() -> None:
    workers = {
        "ours": Fake("ours", [], np.array([1.0, -4.2])),
        "torch": Fake("torch", [], np.array([1.0, -4.0])),
        "shape": Fake("shape", [], np.zeros(3)),
    }
    found = {m.engine: m for m in race(workers, None, {}, calls=1)}
    assert found["ours"].error == pytest.approx(0.05)
    assert found["torch"].error == 0 and found["shape"].error == float("inf")
    assert found["ours"].cosine == pytest.approx(17.8 / (17 * 18.64) ** 0.5) and found["shape"].cosine == 0


def test_a_failure_is_recorded_and_a_slow_engine_is_timed_once() -> None:
    log: list[str] = []
    workers = {
        "torch": Fake("torch", log, np.ones(1)),
        "slow": Fake("slow", log, np.ones(1), milliseconds=60_000.0),
        "broken": Fake("broken", log, np.ones(1), fails=True),
    }
    found = {m.engine: m for m in race(workers, None, {}, calls=3)}
    assert found["broken"].failure == "no such thing" and found["broken"].median is None
    assert found["slow"].milliseconds == [60_000.0] and found["slow"].error == 0
    assert set(log) == {"torch"}


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = Folder(tmp_path, ("input_ids", "pixel_values"))
    before = source.content
    assert source.dynamic_axes == {"input_ids": {0: "batch", 1: "length"}, "pixel_values": {0: "batch"}}
    (tmp_path / "config.json").write_text('{"changed": 1}')
    os.utime(tmp_path / "config.json", (1, 1))
    assert Folder(tmp_path, ("input_ids", "pixel_values")).content != before
