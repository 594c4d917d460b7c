"""One run of a program over calibration data that answers all requests of a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import fx

from tersor.errors import InputError, TersorError
from tersor.ir import Function, Program, run
from tersor.passes.calibration.batches import Batches, Dataset
from tersor.passes.calibration.counterparts import Counterparts
from tersor.passes.calibration.padding import Padding, Tokens
from tersor.passes.calibration.requests import Request, Split, Statistics
from tersor.passes.calibration.statistics import Statistic
from tersor.passes.calibration.store import StatisticsStore, Tensors, Unfinished
from tersor.passes.sites import in_words

Wanted = Mapping[fx.Node, list[Statistic]]


def calibrate(
    program: Program,
    requests: Iterable[Request],
    dataset: Dataset,
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    title: str = "calibrating",
) -> Statistics:
    """Answers requests by running ``main`` over the data; equal ones share the work.

    Values of other functions have the statistics of their counterparts in ``main`` (`Counterparts`): a decoder's step
    those of its prefill. Statistics belong to a value, that is to everything that it is computed from: where a cache
    has one for the same value and data, it is not gathered again, even if the program has changed elsewhere. Values
    that no data reaches (without a counterpart, or all padding) get None.

    Args:
        seed: fixes which rows are sampled.
        cache: a folder for results; None keeps nothing.
        title: what the progress bar on a terminal says.

    Raises:
        InputError: a batch does not run, a value is NaN or infinite, or a site does not exist.
    """
    requests = list(requests)
    counterparts = Counterparts(program.main)
    values = {request: _measured(request, program, counterparts) for request in requests}
    store = StatisticsStore(cache, dataset.digest, seed) if cache is not None else None
    answers: dict[tuple[fx.Node, Statistic, Split], Statistic] = {}
    wanted: dict[Split, dict[fx.Node, list[Statistic]]] = {
        "fit": defaultdict(list),
        "held_out": defaultdict(list),
    }
    digests = program.main.value_digests() if store is not None else {}
    for request in requests:
        node = values[request]
        key = (node, request.what, request.split)
        if node is None or key in answers:
            continue
        kept = store.load(digests[node], request.what, request.split) if store is not None else None
        answers[key] = kept or request.what.fresh()
        if kept is None:
            wanted[request.split][node].append(answers[key])
    total = sum(len(_batches(dataset, split)) for split, nodes in wanted.items() if nodes)
    with progress(title, total) as advance:
        for split, nodes in wanted.items():
            if not nodes:
                continue
            gather, data, unfinished = Gatherer(nodes, seed), _batches(dataset, split), None
            if store is not None:
                gathered = [(digests[node], s) for node, statistics in nodes.items() for s in statistics]
                unfinished = store.sweep(gathered, split)
            _sweep(program.main, gather, data, unfinished, advance)
            if store is not None:
                for digest, statistic in gathered:
                    store.store(digest, statistic, split)
                unfinished.drop()
    found = {}
    for request, node in values.items():
        answer = answers.get((node, request.what, request.split))
        found[request] = answer if answer is not None and answer.count else None
    return Statistics(found)


def _measured(request: Request, program: Program, counterparts: Counterparts) -> fx.Node | None:
    """The value of ``main`` that answers a request; an operation elsewhere has that of its counterpart, if any."""
    function, node = request.value(program)
    if function is program.main:
        return node
    counterpart = counterparts.of(function, request.operation(program))
    return None if counterpart is None else replace(request, site=counterpart).value(program)[1]


def _batches(dataset: Dataset, split: Split) -> Batches:
    return dataset.fit if split == "fit" else dataset.held_out


def _sweep(
    function: Function, gather: Gatherer, batches: Batches, unfinished: Unfinished | None, advance
) -> None:
    padding, done = Padding(function), 0
    if unfinished is not None and (found := unfinished.load()) is not None:
        state, done = found
        gather.restore(state)
    for _ in range(done):
        advance()
    for index in range(done, len(batches)):
        batch = batches[index]
        tokens = padding.of(batch.inputs, batch.mask)
        for node in function.input_nodes:
            gather(node, batch.inputs[node.target], tokens, batches.names[index])
        with running(batches.names[index]):
            run(function, batch.inputs, observe=gather.observer(tokens, batches.names[index]))
        if unfinished is not None:
            unfinished.keep(gather.state, index + 1)
        advance()


@contextmanager
def running(name: str) -> Iterator[None]:
    """Runs the batch of this name; an InputError says of it what went wrong."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:  # whatever torch says to inputs that a model cannot take
        ours = isinstance(error, TersorError)
        if ours and (not isinstance(error, InputError) or error.where == name):
            raise
        raise InputError(
            f"{name} does not run",
            where=error.where if ours else None,
            why=": ".join(filter(None, (error.what, error.why)))
            if ours
            else f"{type(error).__name__}: {error}",
            fix="give inputs that the model itself accepts",
        ) from error


def check_finite(node: fx.Node, rows: torch.Tensor, batch: str) -> None:
    """InputError when a value of the batch of this name is NaN or infinite."""
    # a sum is finite where all numbers are, but for an overflow, and is found in one pass
    if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
        raise InputError(
            f"{in_words(node)} is NaN or infinite",
            where=batch,
            why="the model overflows on this data, or a row of its masks hides everything",
            fix="leave such samples out of the calibration data",
        )


class Gatherer:
    """Feeds values to the statistics that are wanted of them."""

    def __init__(self, wanted: Wanted, seed: int):
        self._wanted = wanted
        self._statistics = [statistic for statistics in wanted.values() for statistic in statistics]
        # one seed for all: values laid out alike are sampled at the same rows
        self._generators = {id(s): torch.Generator().manual_seed(seed) for s in self._statistics}

    def state(self) -> Tensors:
        """All that it has gathered, and where its random numbers stand."""
        tensors = {}
        for i, statistic in enumerate(self._statistics):
            tensors[f"random.{i}"] = self._generators[id(statistic)].get_state()
            tensors |= {f"{i}.{name}": tensor for name, tensor in statistic.state().items()}
        return tensors

    def restore(self, state: Tensors) -> None:
        """Goes on from the `state` of one that gathered the same."""
        for i, statistic in enumerate(self._statistics):
            self._generators[id(statistic)].set_state(state[f"random.{i}"])
            own = {name.removeprefix(f"{i}."): t for name, t in state.items() if name.startswith(f"{i}.")}
            statistic.restore(own)

    def observer(self, tokens: Tokens, batch: str):
        """What the interpreter calls with each result of the batch of this name."""
        return lambda node, tensor: self(node, tensor, tokens, batch)

    def __call__(self, node: fx.Node, tensor: torch.Tensor, tokens: Tokens, batch: str) -> None:
        statistics = self._wanted.get(node)
        if not statistics:
            return
        rows = tokens.rows(node, tensor)
        if not len(rows):
            return
        check_finite(node, rows, batch)
        for statistic in statistics:
            statistic.update(rows, self._generators[id(statistic)])


def progress(title: str | None, total: int):
    """A bar with an estimate of the time left, on standard error where that is a terminal; gives a step function.

    None for a title shows nothing.
    """
    console = Console(stderr=True)
    if title is None or not console.is_terminal or total < 2:
        return nullcontext(lambda: None)
    return _Bar(title, total, console)


class _Bar:
    def __init__(self, title: str, total: int, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console)
        self._console, self._title, self._total = console, title, total

    def __enter__(self):
        self._console.print()  # whatever names the step stands on the line before
        self._bar.start()
        task = self._bar.add_task(self._title, total=self._total)
        return lambda: self._bar.advance(task)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
