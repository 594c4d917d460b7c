"""Going through a program block by block on what its changed beginning gives.

Methods that repair the error of earlier blocks in later ones (GPTQ, least squares) need the inputs of block i under
the blocks before it as they are now. One sweep serves all, and one block's values are held at a time::

    for step in sequential(program, context.calibration):
        found = step.gather([Request(linear, Gram()) for linear in step.calls("linear")])
        ...                                          # change parameters or operations of this block
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tersor.errors import PipelineError
from tersor.ir import Program
from tersor.ir.block import Block, BlockState, blocks, start
from tersor.ir.interpreter import Observer
from tersor.passes.calibration.batches import Batches, Dataset
from tersor.passes.calibration.padding import Padding, Tokens
from tersor.passes.calibration.requests import Request, Split, Statistics
from tersor.passes.calibration.statistics import Statistic
from tersor.passes.calibration.sweep import Gatherer, check_finite, progress, running


@dataclass
class Step:
    """A block of ``main``, and what stands before it for each batch.

    Values are kept up to the first operation that reads what was asked for last; the next question goes on from there.
    So a pass that asks for the inputs of layers in their order, and changes each before it asks for the next, costs one
    run of the block. Where something earlier has changed, or is asked for, the block begins anew.

    Attributes:
        program: the program, whose earlier blocks are as they are now.
        index: the block's place in `tersor.ir.block.blocks`.
        states: the values before the block, one per batch.
    """

    program: Program
    index: int
    states: list[BlockState]
    _batches: Batches = field(repr=False)
    _split: Split = "fit"
    _seed: int = 0
    _reached: _Reached | None = field(default=None, init=False, repr=False)

    @property
    def block(self) -> Block:
        """The block as it is now."""
        return blocks(self.program.main)[self.index]

    def calls(self, *names: str) -> list[fx.Node]:
        """The block's operations in order; only those of the named operations where names are given."""
        return [
            n for n in self.block.nodes if n.op == "call_function" and (not names or n.target.name in names)
        ]

    def gather(self, requests: Iterable[Request]) -> Statistics:
        """Answers requests about values that the block computes or reads, by running it as it is now.

        Raises:
            InputError: a value is NaN or infinite.
            PipelineError: a value belongs to another block, or to the data of another split.
        """
        requests = list(requests)
        values = {request: request.value(self.program)[1] for request in requests}
        answers: dict[tuple[fx.Node, Statistic], Statistic] = {}
        wanted: dict[fx.Node, list[Statistic]] = defaultdict(list)
        for request, node in values.items():
            if request.split != self._split:
                raise self._elsewhere(node, request.split)
            if (node, request.what) not in answers:
                answers[node, request.what] = request.what.fresh()
                wanted[node].append(answers[node, request.what])
        gather = Gatherer(wanted, self._seed)
        for batch, tokens, observe in self._observed(wanted.keys()):
            observe(gather.observer(tokens, batch))
        found = {request: answers[node, request.what] for request, node in values.items()}
        return Statistics({request: answer if answer.count else None for request, answer in found.items()})

    def rows(self, nodes: Iterable[fx.Node]) -> Iterator[dict[fx.Node, torch.Tensor]]:
        """Values that the block computes or reads, as rows [n, channels] without padding, batch by batch.

        Raises:
            InputError: a value is NaN or infinite.
            PipelineError: a value belongs to another block.
        """
        wanted = frozenset(nodes)
        for batch, tokens, observe in self._observed(wanted):
            found: dict[fx.Node, torch.Tensor] = {}

            def keep(node: fx.Node, tensor: torch.Tensor, batch=batch, tokens=tokens, found=found) -> None:
                if node in wanted:
                    found[node] = tokens.rows(node, tensor)
                    check_finite(node, found[node], batch)

            observe(keep)
            yield found

    def _observed(self, wanted: Set[fx.Node]) -> Iterator[tuple[str, Tokens, Callable[[Observer], None]]]:
        """For each batch its name, its padding, and what shows the block's values, up to the last one wanted."""
        block, padding = self.block, Padding(self.program.main)
        inside = {*block.nodes, *block.inputs}
        for node in wanted:
            if node not in inside:
                raise self._elsewhere(node, self._split)
        left, states = self._left(block, wanted)
        nodes = left.operations
        end = max((i for i, node in enumerate(nodes) if node in wanted), default=-1) + 1
        middle = next((i for i, n in enumerate(nodes[:end]) if wanted & set(n.all_input_nodes)), end)
        before, rest = left.cut(nodes[:middle])
        after = replace(rest.cut(nodes[middle:end])[0], carried=frozenset())
        reached: list[BlockState] = []
        for state, batch, name in zip(states, self._batches, self._batches.names, strict=True):

            def observe(observer: Observer, state=state, name=name) -> None:
                for node in wanted & state.values.keys():
                    observer(node, state.values[node])
                reached.append(_run(before, state, name, observer))
                _run(after, reached[-1], name, observer)

            yield name, padding.of(batch.inputs, batch.mask), observe
        done = {*block.operations} - {*rest.operations}
        digests = self.program.main.value_digests()
        self._reached = _Reached(done, reached, {n: digests[n] for n in reached[0].values})

    def finish(self) -> list[BlockState]:
        """The values behind the block as it is now, one per batch."""
        left, states = self._left(self.block)
        return [_run(left, state, name) for name, state in zip(self._batches.names, states, strict=True)]

    def _left(self, block: Block, wanted: Collection[fx.Node] = ()) -> tuple[Block, list[BlockState]]:
        """What is still to be run of the block as it is now, and the values before that for each batch."""
        if self._reached is not None:
            done, left = block.cut(self._reached.operations)
            now, known = self.program.main.value_digests(), self._reached.digests
            still = all(known.get(node) == now[node] for node in done.carried)
            if still and all(node in known or node in left.nodes for node in wanted):
                return left, self._reached.states
        return block, self.states

    def _elsewhere(self, node: fx.Node, split: Split) -> PipelineError:
        return PipelineError(
            f"%{node.name} ({split}) cannot be gathered in {self.block.name} on data of {self._split!r}",
            fix="ask in the step of its own block, on the split that sequential() goes through",
        )


def sequential(
    program: Program,
    dataset: Dataset,
    *,
    split: Split = "fit",
    seed: int = 0,
    title: str | None = "calibrating",
) -> Iterator[Step]:
    """The blocks of ``main`` in order, each with its inputs under the blocks before it as they are by then.

    Between two steps a pass may replace parameters and operations of the step's block; values that leave the block
    keep their shape, and what other blocks hold stays. Two of these side by side, over the captured program and over
    the changed one, give targets and inputs for reconstruction; one over each split, inputs to fit to and to judge by.
    ``title`` is what the progress bar says; None shows none.

    Raises:
        InputError: a batch does not run.
        PipelineError: a change moved the borders of the blocks.
    """
    function, batches = program.main, dataset.fit if split == "fit" else dataset.held_out
    states = [start(function, batch.inputs) for batch in batches]
    count = len(blocks(function))
    with progress(title, count) as advance:
        for index in range(count):
            yield (step := Step(program, index, states, batches, split, seed))
            now = blocks(function)
            if len(now) != count:
                raise PipelineError(
                    f"the function had {count} blocks and has {len(now)} now",
                    fix="keep the additions and norms between layers",
                )
            states = step.finish()
            advance()


@dataclass(frozen=True)
class _Reached:
    """How far a block has been run: its operations up to there, the values that stand there, and their digests."""

    operations: set[fx.Node]
    states: list[BlockState]
    digests: dict[fx.Node, str]


def _run(block: Block, state: BlockState, batch: str, observe=None) -> BlockState:
    with running(batch):
        return block.run(state, observe)
