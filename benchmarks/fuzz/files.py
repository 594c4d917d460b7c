"""Damaged and hostile ONNX files: captured or refused by a `TersorError`, with nothing read outside their folder."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

import tersor
from benchmarks.fuzz.case import Outcome, Stage
from benchmarks.fuzz.mutations import mutate
from benchmarks.fuzz.originals import originals
from benchmarks.fuzz.peer import compare_with_onnxruntime, sample_inputs_of
from benchmarks.fuzz.soups import random_model
from benchmarks.fuzz.watch import Watch

SECRET = bytes(range(1, 256)) * 64
"""What lies outside the folder; no byte of it may be read."""


class Files:
    """Each case is a file in a folder of its own, with canaries beside the folder."""

    limit, memory = 30.0, 512 << 20

    def __init__(self, models: Sequence[onnx.ModelProto] | None = None):
        torch.set_num_threads(1)
        self.models = originals() if models is None else models

    def run(self, rng: random.Random, stage: Stage) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="tersor-fuzz-") as place:
            folder, outside = Path(place, "model"), Path(place, "outside")
            folder.mkdir()
            outside.mkdir()
            (outside / "secret.bin").write_bytes(SECRET)
            stage("making")
            path = folder / "model.onnx"
            original = random_model(rng) if rng.random() < 0.15 else rng.choice(self.models)
            model = onnx.ModelProto.FromString(original.SerializeToString())
            path.write_bytes(mutate(rng, model, folder))
            with Watch(folder, (outside, outside / "secret.bin")) as watch:
                stage("capturing")
                try:
                    program = tersor.capture(path)
                except tersor.TersorError as error:
                    outcome = Outcome("refused", type(error).__name__, str(error))
                else:
                    outcome = None
            if watch.seen:
                return Outcome("outside read", watch.seen[0], "\n".join(watch.seen))
            if outcome is None:
                stage("comparing")
                outcome = compare_with_onnxruntime(str(path), program, stage, sample_inputs_of)
            return outcome
