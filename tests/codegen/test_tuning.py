"""The tuning database: found again by content, unharmed by kills, used only where asked for; the analytic chooser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_harness import run_kernel

from tersor.codegen import tuning
from tersor.codegen.kernels.assembly import Loop
from tersor.codegen.kernels.chain import Chain, ChainInput
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.inner_product import ACCUMULATORS, inner_product, multiplies_fp16
from tersor.codegen.packing import pack
from tersor.codegen.tiles import (
    PANEL_VECTORS,
    GemmTile,
    choose,
    most_rows,
    neighbours,
    panel_width,
    partition,
)
from tersor.codegen.tuning import Database, Record, recorded_tile, tune, using
from tersor.errors import CompileError, TargetError
from tersor.ir.dims import Dim
from tersor.targets import resolve

AVX2, AVX512 = resolve("x86-64-v3"), resolve("x86-64-v4")
ARMV7, ARMV8, I8MM = resolve("armv7-neon"), resolve("armv8-a"), resolve("armv8.6-i8mm")
TILE = GemmTile(6, (1, 6), blocks=2)


def record(kernel, target=AVX2, tile=TILE):
    return Record(tuning.key(kernel, target), kernel.name(), tile, 1e-3, 2e-3)


@pytest.fixture
def timings(monkeypatch):
    """Makes tiles of 4 rows the fastest without timing anything; the kernels and tiles that were asked for."""
    asked = []

    def seconds(kernel, target, tile):
        asked.append((kernel, tile))
        return 0.5 if tile.rows == 4 else 1.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "missing_on_host", lambda target: [])
    return asked


def test_analytic_tiles():
    assert (panel_width(AVX2), choose(AVX2, 24).rows, most_rows(AVX2)) == (16, 6, 6)
    assert (panel_width(AVX512), choose(AVX512, 24).rows, most_rows(AVX512)) == (32, 8, 12)
    assert (panel_width(ARMV8), choose(ARMV8, 24).rows, most_rows(ARMV8)) == (8, 9, 8)
    assert choose(I8MM, 24, inner_product("uint8", I8MM)).rows == 12
    assert (panel_width(ARMV7), choose(ARMV7, 24).rows, most_rows(ARMV7)) == (8, 3, 3)
    # words that are taken apart before they are multiplied need registers
    assert [choose(t, 24, inner_product("bfloat16", t)).rows for t in (AVX2, AVX512)] == [5, 6]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
@pytest.mark.parametrize("target", [AVX2, AVX512, ARMV7, ARMV8, I8MM], ids=lambda target: target.name)
def test_every_candidate_fits_the_registers(target, dtype):
    if dtype == "float16" and not multiplies_fp16(target):
        product = inner_product("float32", target, "float16")
    else:
        product = inner_product(dtype, target)
    analytic = choose(target, 3, product)
    for tile in (analytic, *neighbours(analytic, target, product)):
        assert tile.streams == tuple(sorted(tile.streams))
        assert all(rows % product.block[0] == 0 for rows in (tile.rows, *tile.streams))
        tallest = max(tile.rows, *tile.streams) // product.block[0]
        if product.assembly:
            Loop(product.assembly, tallest, PANEL_VECTORS * product.per_vector, product.assembly.piece or 96)
            continue
        each = 2 * product.lanes // product.block[1] + (len(product.parts) if product.loads else 0)
        held = 1 if product.block[1] < product.lanes else 2 * len(product.parts)
        assert tallest * each + held + 1 <= target.vector_registers


@pytest.mark.parametrize(
    "cores, panels, blocks", [(None, 3, 1), (2, 12, 1), (2, 3, 2), (8, 12, 2), (4, 1, 4), (2, 1571, 1)]
)
def test_blocks_balance_threads(cores, panels, blocks):
    target = replace(AVX512, cores=cores, sources={**AVX512.sources, "cores": "assumed"})
    assert choose(target, panels).blocks == blocks


def test_tile_without_a_way_to_compute_some_row_count():
    assert GemmTile(5, (1, 4))
    with pytest.raises(ValueError, match="gap"):
        GemmTile(6, (1, 4))


@pytest.mark.parametrize("m", [1, 7, 8, 9, 13, 64, 127, 197])
def test_partition_is_exact(m):
    parts = partition(m, 8)
    assert sum(count * height for count, height in parts) == m
    assert sum(count for count, _ in parts) == -(-m // 8)
    assert max(height for _, height in parts) <= 8


def test_records_are_found_by_content(tmp_path):
    database = Database(tmp_path / "new folder" / "tuning.jsonl")
    kernel, symbolic = Gemm((8,), 16, 32, panel=16), Gemm((Dim.symbol("rows"),), 16, 32, panel=16)
    database.add(record(kernel))
    again = Database(database.path)
    assert len(again) == 1
    assert again.find(Gemm((8,), 16, 32, panel=16), replace(AVX2, name="other")).tile == TILE
    assert again.find(symbolic, AVX2) is None
    assert again.find(kernel, AVX512) is None
    assert list(again.used) == [tuning.key(kernel, AVX2)]


def test_last_record_wins(tmp_path):
    database, kernel = Database(tmp_path / "t.jsonl"), Gemm((8,), 16, 32, panel=16)
    database.add(record(kernel))
    database.add(record(kernel, tile=replace(TILE, rows=4)))
    assert Database(database.path).find(kernel, AVX2).tile.rows == 4


def test_torn_write_loses_only_its_own_record(tmp_path):
    database = Database(tmp_path / "t.jsonl")
    first, second, third = (Gemm((m,), 16, 32, panel=16) for m in (1, 2, 3))
    database.add(record(first))
    with database.path.open("a") as file:
        file.write(record(second).to_json()[:40])
    again = Database(database.path)
    again.add(record(third))
    last = Database(database.path)
    assert [last.find(kernel, AVX2) is not None for kernel in (first, second, third)] == [True, False, True]


def test_a_file_that_cannot_be_used_is_explained(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff")
    for path in (tmp_path / "file", tmp_path / "file" / "tuning.jsonl", tmp_path):
        with pytest.raises(CompileError, match="cannot be used(\n.*)*XDG_CACHE_HOME"):
            Database(path)
    database = Database(tmp_path / "t.jsonl")
    database.path.mkdir()
    with pytest.raises(CompileError, match="cannot be used"):
        database.add(record(Gemm((8,), 16, 32, panel=16)))


@pytest.mark.parametrize("line", ["", "[]", "3", "{}", '{"tile": 3}', '{"tile": {"rows": 3}}', "\x00"])
def test_lines_that_are_not_records(line):
    assert Record.from_json(line) is None


def test_tiles_are_used_only_within_using(tmp_path):
    database, kernel = Database(tmp_path / "t.jsonl"), Gemm((8,), 16, 32, panel=16)
    database.add(record(kernel))
    assert recorded_tile(kernel, AVX2) is None
    with using(database):
        assert recorded_tile(kernel, AVX2) == TILE
    assert recorded_tile(kernel, AVX2) is None


def test_recorded_tile_changes_the_code_not_the_result(tmp_path, target):
    rng = np.random.default_rng(0)
    a, w = rng.standard_normal((20, 16), dtype=np.float32), rng.standard_normal((40, 16), dtype=np.float32)
    kernel = Gemm((20,), 16, 40, panel=panel_width(target))
    plain = kernel.build(target).script()
    assert kernel.build(target).script() == plain
    database = Database(tmp_path / "t.jsonl")
    database.add(record(kernel, target, GemmTile(4, (1, 2, 4))))
    several = replace(target, name="tuned")
    with using(database):
        assert kernel.build(several).script() != plain
        (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], several)
    np.testing.assert_allclose(got, a @ w.T, atol=1e-5)


def test_search_keeps_the_fastest_and_resumes(tmp_path, timings):
    kernels = [Gemm((m,), 64, 64, panel=16) for m in (20, 30)]
    database = Database(tmp_path / "t.jsonl")
    texts = []
    found = tune([*kernels, kernels[0]], AVX2, database, minutes=1, progress=texts.append)
    assert [r.tile.rows for r in found] == [4, 4] and len(texts) == 2
    assert (found[0].seconds, found[0].analytic_seconds) == (0.5, 1.0)
    timings.clear()
    assert tune(kernels, AVX2, Database(database.path), minutes=1) == [] and not timings


def test_tiles_that_make_no_difference_are_not_timed(tmp_path, timings):
    """Three rows are one streaming tile: neither the height of other tiles nor blocks matter."""
    tune([Gemm((3,), 64, 64, panel=16)], AVX2, Database(tmp_path / "t.jsonl"), minutes=1)
    assert sorted(tile.ahead for _, tile in timings) == [6144, 12288, 24576]


def test_small_gains_are_noise(tmp_path, monkeypatch, timings):
    monkeypatch.setattr(tuning, "_seconds", lambda kernel, target, tile: 0.99 if tile.rows == 4 else 1.0)
    (found,) = tune([Gemm((20,), 64, 64, panel=16)], AVX2, Database(tmp_path / "t.jsonl"), minutes=1)
    assert found.tile == choose(AVX2, 4)


def test_no_time_records_nothing(tmp_path, timings):
    database, texts = Database(tmp_path / "t.jsonl"), []
    assert tune([Gemm((20,), 64, 64, panel=16)], AVX2, database, minutes=0, progress=texts.append) == []
    assert len(database) == 0 and not database.path.exists() and "analytic" in texts[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_search_on_this_machine(dtype, tmp_path, target, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "COLD_BYTES", 1e5)
    monkeypatch.setattr(tuning, "neighbours", lambda tile, target, product: (replace(tile, rows=4),))
    sums = Chain((ChainInput("accumulator", ACCUMULATORS[dtype]),), (), (0,))
    lead, panel = (Dim.symbol("batch"), Dim.symbol("length")), panel_width(target)
    kernel = Gemm(lead, 64, 64, sums, panel, dtype=dtype)
    (found,) = tune([kernel], target, Database(tmp_path / "t.jsonl"), minutes=1)
    assert found.kernel == kernel.name() and 0 < found.seconds <= found.analytic_seconds


def test_foreign_target_cannot_be_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "missing_on_host", lambda target: ["avx512f"])
    with pytest.raises(TargetError, match="avx512f"):
        tune([Gemm((20,), 64, 64, panel=32)], AVX512, Database(tmp_path / "t.jsonl"), minutes=1)
