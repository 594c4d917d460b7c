"""Random Transformer-shaped graphs: made, captured, through the fp32 recipe, compiled, compared with torch."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

import tersor
from benchmarks.fuzz.case import Outcome, Stage
from benchmarks.fuzz.compare import IllConditioned, Tensors, disagreement, spread
from benchmarks.fuzz.modules import Replayed, axes_of, random_module
from benchmarks.fuzz.peer import compare_with_onnxruntime, sample_inputs_of
from benchmarks.fuzz.programs import random_program
from tersor.codegen.compare import probe_sizes
from tersor.ir import Program, verify
from tersor.ir.canonicalize import canonicalize
from tersor.ir.samples import sample_inputs
from tersor.passes.numerics import small_sizes
from tests.passes.programs import random_transformer

SHARES = {"program": 36, "canonical": 24, "exported": 24, "written": 14, "transformer": 1, "module": 1}
"""Kinds of cases, per cent; the last two have many matrix products and take ten times as long to compile."""

Reference = Callable[[Tensors, int], tuple[Tensors, Tensors]]
"""From inputs and a seed: the results, and how far rounding moves each element."""


class Graphs:
    limit, memory = 240.0, 3 << 30

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, rng: random.Random, stage: Stage) -> Outcome:
        stage("making")
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        return getattr(self, kind)(rng, stage)

    def program(self, rng: random.Random, stage: Stage) -> Outcome:
        """A random program, compiled as it is."""
        program = random_program(rng)
        return self._check(program, program, stage)

    def canonical(self, rng: random.Random, stage: Stage) -> Outcome:
        """A random program in canonical form, against what it was before."""
        program = random_program(rng)
        captured = program.copy()
        stage("capturing")
        canonicalize(captured)
        return self._check(program, captured, stage)

    def exported(self, rng: random.Random, stage: Stage) -> Outcome:
        """A random program that goes out to torch and comes back through torch.export."""
        program = random_program(rng)
        function = program.main
        stage("capturing")
        example = sample_inputs(function, small_sizes(function))
        captured = tersor.capture(Replayed(program), example, axes_of(function) or None)
        return self._check(program, captured, stage)

    def written(self, rng: random.Random, stage: Stage) -> Outcome:
        """A random program that goes out as an ONNX file and comes back; onnxruntime runs the file."""
        program = random_program(rng)
        stage("writing")
        model = tersor.to_onnx(program)
        outcome = compare_with_onnxruntime(model.SerializeToString(), program, stage, sample_inputs_of)
        if outcome.kind != "right":
            return outcome
        stage("capturing")
        return self._check(program, tersor.capture(model), stage)

    def transformer(self, rng: random.Random, stage: Stage) -> Outcome:
        """A whole Transformer as a program."""
        program = random_transformer(rng).build()
        return self._check(program, program, stage)

    def module(self, rng: random.Random, stage: Stage) -> Outcome:
        """A Transformer as a torch module, against itself."""
        example = random_module(rng)
        stage("capturing")
        captured = tersor.capture(example.module, example.inputs, example.dynamic or None)
        (name,) = captured.main.outputs

        def reference(inputs: Tensors, seed: int) -> tuple[Tensors, Tensors]:
            _, slack = spread(captured.main, inputs, seed)
            with torch.no_grad():
                return {name: example.module(**inputs)}, slack

        return self._compared(captured, captured, reference, stage)

    def _check(self, program: Program, captured: Program, stage: Stage) -> Outcome:
        return self._compared(
            program, captured, lambda inputs, seed: spread(program.main, inputs, seed), stage
        )

    @staticmethod
    def _compared(program: Program, captured: Program, reference: Reference, stage: Stage) -> Outcome:
        """Compiles what was captured, and compares it at several sizes of the named dimensions."""
        verify(captured)
        stage("compiling")
        compiled = tersor.compile(captured, threads=1, verify=False)
        lost, probes = 0, probe_sizes(program.main)
        for seed, sizes in enumerate(probes):
            inputs = sample_inputs(program.main, sizes, seed)
            stage("torch")
            expected, slack = reference(inputs, seed)
            stage("running")
            given = {name: inputs[name] for name in captured.main.inputs}
            actual = {name: torch.as_tensor(value) for name, value in compiled(**given).items()}
            try:
                wrong = disagreement(actual, expected, slack)
            except IllConditioned:
                lost += 1
                continue
            if wrong:
                return Outcome(
                    "wrong", "compiled", f"at {sizes}: {wrong}\n{program}\n\ncompiled from:\n{captured}"
                )
        return Outcome("unchecked", "rounding decides") if lost == len(probes) else Outcome("right")
