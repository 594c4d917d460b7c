"""Whole programs as C for other CPUs, run under emulation, against the program in torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tersor.codegen.export.toolchain import toolchain
from tersor.ir import run
from tersor.targets import resolve
from tests.codegen import emulator
from tests.codegen.export.exported import export, inputs
from tests.ir import small_models


@pytest.mark.parametrize(("name", "cpus"), [("armv8-a", ("cortex-a53", "max")), ("armv7-neon", ("max",))])
def test_a_small_bert(name, cpus, tmp_path):
    target = replace(
        resolve(name), os="linux-musl"
    )  # static programs, which qemu runs without a system around them
    program = small_models.bert(layers=1)
    out = export(program, tmp_path / "out", target)
    files = [out / "main.c", out / "libmodel.a"]
    toolchain(target, static=True).link(files, tmp_path / "main", static=True, options=[f"-I{out}"])
    for cpu in cpus:
        for batch, length in ((1, 1), (3, 7)):
            given = inputs(program, {"batch": batch, "length": length})
            (tmp_path / "in").write_bytes(b"".join(value.tobytes() for value in given.values()))
            options = [str(out / "weights.bin"), f"batch={batch}", f"length={length}", "threads=2"]
            options += [f"in={tmp_path / 'in'}", f"out={tmp_path / 'found'}"]
            emulator.run(tmp_path / "main", target, *options, cpu=cpu)
            found = (tmp_path / "found").read_bytes()
            for expected in run(program.main, {k: torch.from_numpy(v) for k, v in given.items()}).values():
                size = 4 * expected.numel()
                values = np.frombuffer(found[:size], np.float32).reshape(expected.shape)
                np.testing.assert_allclose(values, expected.numpy(), atol=1e-4)
                found = found[size:]
            assert not found
