"""Random Transformer-shaped graphs: made, captured, through the fp32 recipe, compiled, compared with torch."""

from __future__ import annotations

import random

import torch

import tersor
from benchmarks.fuzz.case import Outcome, Stage
from benchmarks.fuzz.compare import IllConditioned, disagreement, spread
from benchmarks.fuzz.programs import random_program
from tersor.codegen.compare import probe_sizes
from tersor.ir import Program, verify
from tersor.ir.samples import sample_inputs


class Graphs:
    limit, memory = 240.0, 3 << 30

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, rng: random.Random, stage: Stage) -> Outcome:
        stage("making")
        return self.program(rng, stage)

    def program(self, rng: random.Random, stage: Stage) -> Outcome:
        program = random_program(rng)
        return self.check(program, stage)

    def check(self, program: Program, stage: Stage) -> Outcome:
        verify(program)
        stage("compiling")
        compiled = tersor.compile(program, threads=1, verify=False)
        function, lost = program.main, 0
        for seed, sizes in enumerate(probe_sizes(function)):
            inputs = sample_inputs(function, sizes, seed)
            stage("torch")
            expected, slack = spread(function, inputs, seed)
            stage("running")
            actual = {name: torch.as_tensor(value) for name, value in compiled(**inputs).items()}
            try:
                wrong = disagreement(actual, expected, slack)
            except IllConditioned:
                lost += 1
                continue
            if wrong:
                return Outcome("wrong", "compiled", f"at {sizes}: {wrong}\n{program}")
        return Outcome("unchecked", "rounding decides") if lost > seed else Outcome("right")
