"""No kernel reads or writes past the end of a tensor, whatever its size: beyond may be memory of nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tersor.ir import Dim, Program, Range, Value
from tests.codegen.export.exported import export
from tests.ir.small_models import Maker

WIDTH = 77
"""Some whole vectors and a rest, of any target."""

N = Dim.symbol("n")


def program(rows: int | Dim) -> Program:
    """Operations that read inputs and write results directly, row by row."""
    m = Maker({} if isinstance(rows, int) else {"n": Range(1, 300)})
    build, add = m.build, m.function.add_input
    x, ids = add("x", Value("float32", (rows, WIDTH))), add("ids", Value("int64", (rows, WIDTH)))
    keys, mask = (
        add("keys", Value("float32", (1, WIDTH, 16))),
        add("mask", Value("float32", (1, 1, 1, WIDTH))),
    )
    queries = add("queries", Value("float32", (1, rows, 16)))
    return m.done(
        softmax=build.softmax(x, dim=-1),
        log_softmax=build.log_softmax(x, dim=-1),
        layer_norm=build.layer_norm(x, m.weight("gamma", WIDTH), m.weight("beta", WIDTH)),
        rms_norm=build.rms_norm(x, m.weight("scale", WIDTH)),
        sum=build.sum(x, dims=(1,)),
        sum_ids=build.sum(ids, dims=(1,)),
        cumsum=build.cumsum(x, dim=1),
        cast=build.cast(ids, dtype="float32"),
        larger=build.gt(x, 0.5),
        slice=build.slice(x, dim=1, start=1),
        concat=build.concat((x, x), dim=1),
        permute=build.permute(x, dims=(1, 0)),
        linear=m.linear(x, "linear", WIDTH),
        matmul=build.matmul(x, build.permute(x, dims=(1, 0))),
        attention=m.attention(queries, keys, keys, mask),
    )


@pytest.mark.parametrize("rows", [3, N])
@pytest.mark.parametrize("target", ["x86-64-v3", "native"])
def test_kernels_stay_inside(rows, target, tmp_path):
    out = export(program(rows), tmp_path / "out", target)
    for n in (1, 3, 17) if rows is N else (3,):
        command = [sys.executable, Path(__file__).with_name("guarded.py"), out, json.dumps({"n": n})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{n} rows: exit code {done.returncode}\n{done.stderr}"
