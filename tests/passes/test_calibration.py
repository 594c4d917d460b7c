"""The calibration engine: data in any form, padding left out, bounded statistics, one sweep, a held-out part."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

import tersor
from tersor.errors import InputError, PipelineError
from tersor.ir import Dim, Program, Range, Value, interpreter, run, verify
from tersor.passes import Calibration, Context, Lossy, Pass, PassResult, Pipeline, Request, Stage, recipes
from tersor.passes.calibration import (
    Dataset,
    Gram,
    Histogram,
    MinMax,
    Moments,
    Samples,
    calibrate,
    sequential,
    store,
    sweep,
)
from tests.ir import stateful
from tests.passes.programs import Transformer, Weights, program

WIDTH = 16


def batches(
    count: int = 5, size: int = 2, length: int = 6, *, mask: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Inputs for `Transformer`; the last tokens of some rows are padding."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(count):
        inputs = {"x": torch.randn(size, length, WIDTH, generator=generator)}
        if mask:
            lengths = torch.tensor([length, 1 + index % length] * size)[:size]
            inputs["mask"] = (torch.arange(length) < lengths.unsqueeze(1)).reshape(size, 1, 1, length)
        made.append(inputs)
    return made


def dataset(made: Program, data, **options) -> Dataset:
    return Dataset.read(Calibration(data, **options), made.main)


def read(data, **options) -> Dataset:
    return dataset(Transformer(layers=1).build(), data, **options)


def contents(data: Dataset) -> list[dict[str, torch.Tensor]]:
    return [dict(batch.inputs) for part in (data.fit, data.held_out) for batch in part]


def same(one: Dataset, other: Dataset) -> bool:
    pairs = zip(contents(one), contents(other), strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


# -- forms of data


def as_dicts(data):
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in data]


def as_tuples(data):
    return tuple((batch["x"], batch["mask"]) for batch in data)


def as_iterator(data):
    return iter(data)


def as_loader(data):
    return torch.utils.data.DataLoader(data, batch_size=None)


def as_double_precision(data):
    return [{"x": batch["x"].double(), "mask": batch["mask"]} for batch in data]


@pytest.mark.parametrize("form", [as_dicts, as_tuples, as_iterator, as_loader, as_double_precision])
def test_the_same_data_in_any_form_is_the_same_dataset(form):
    expected, actual = read(batches()), read(form(batches()))
    assert actual.digest == expected.digest
    assert same(actual, expected) and same(actual, expected), "it can be read twice"


def test_a_folder_of_npz_files(tmp_path):
    for index, batch in enumerate(as_dicts(batches())):
        np.savez(tmp_path / f"{index}.npz", **batch)
    for folder in (tmp_path, str(tmp_path)):
        assert same(read(folder), read(batches()))
    (tmp_path / "2.npz").write_bytes(b"no zip file")
    with pytest.raises(InputError, match="2.npz"):
        read(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        read(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.npz file"):
        read(tmp_path / "empty")


def test_a_bare_tensor_is_a_batch_of_the_only_input():
    made = Transformer(layers=1, mask=None).build()
    data = [batch["x"] for batch in batches(mask=False)]
    assert same(dataset(made, data), dataset(made, batches(mask=False)))


def test_what_is_spooled_goes_with_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = read(iter(batches()))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    del data
    assert not list(tmp_path.iterdir())


def test_an_endless_stream_is_read_up_to_a_limit():
    def endless():
        while True:
            yield from batches()

    assert len(contents(read(endless(), limit=7))) == 7


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no calibration batches"),
        (iter(()), "no calibration batches"),
        (3, "calibration data is a int"),
        (torch.zeros(2, 6, WIDTH), "calibration data is a Tensor"),
        ([3], "batch 0 is a int"),
        ([torch.zeros(2, 6, WIDTH)], "has 1 tensors, the program 2 inputs"),
        ([*batches(1), {"x": torch.zeros(2, 6, WIDTH)}], "batch 1 lacks 'mask'"),
        ([batches(1)[0] | {"labels": torch.zeros(2)}], "'labels', which the program does not take"),
        ([batches(1)[0] | {"x": torch.zeros(2, 6, 3)}], "input 'x' has shape"),
        ([batches(1)[0] | {"x": torch.zeros(2, 6, WIDTH, dtype=torch.int64)}], "'x' is torch.int64"),
        ([batches(1)[0] | {"x": torch.full((2, 6, WIDTH), torch.nan)}], "'x' holds NaN or infinity"),
        ([batches(1)[0] | {"x": "text"}], "'x' is no tensor"),
        ([batches(1)[0] | {"x": torch.zeros(2, 6, WIDTH, device="meta")}], "'x' is a meta tensor"),
        ([batches(1)[0] | {"x": torch.zeros(2, 6, WIDTH).to_sparse()}], "'x' is of layout"),
        ([(batches(1)[0], torch.zeros(2))], "is a tuple with a dict in it"),
        (batches(1, length=33), "dimension 'length' is 33"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        read(data)


@pytest.mark.parametrize(
    "options",
    [
        {"held_out": 1.0}, {"held_out": -0.1}, {"held_out": "all"}, {"limit": 0}, {"limit": 1.5}, {"mask": 3},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError):
        Calibration(batches(), **options)


def test_ids_outside_of_a_table_are_explained(tmp_path):
    made = Program()
    function = made.add_function("main", {"n": Range(1, 8)})
    ids = function.add_input("ids", Value("int64", (Dim.symbol("n"),)))
    build = function.builder()
    function.set_outputs(
        {"y": build.embedding(ids, build.parameter("table", torch.zeros(3, 4)), site="table")}
    )
    verify(made)
    given = [{"ids": torch.tensor([0, 2])}, {"ids": torch.tensor([0, 7])}]  # the last is what is held out
    with pytest.raises(InputError, match="batch 1 does not run") as raised:
        calibrate(
            made,
            [Request("table", MinMax(), of="output", split="held_out")],
            dataset(made, given, held_out=0.5),
        )
    assert "site table" in raised.value.where and "\n" not in raised.value.why
    np.savez(tmp_path / "a.npz", ids=np.array([0, 7]))
    with pytest.raises(InputError, match=r"batch 0 \(.*a.npz\) does not run"):
        calibrate(made, [Request("table", MinMax(), of="output")], dataset(made, tmp_path, held_out=0))


# -- the held-out part


@pytest.mark.parametrize(("count", "kept_back"), [(2, 1), (5, 1), (10, 2), (11, 2), (30, 6)])
def test_a_fixed_part_is_held_out(count, kept_back):
    first, second = read(batches(count)), read(iter(batches(count)))
    assert len(first.held_out) == kept_back and len(first.fit) == count - kept_back
    assert same(first, second)
    everything = contents(first)
    assert len({batch["x"].sum().item() for batch in everything}) == count, "no batch is in both parts"


def test_a_single_batch_is_cut_along_the_batch():
    whole = batches(1, size=4)[0]
    data = read(whole, held_out=0.25)
    assert [len(batch.inputs["x"]) for part in (data.fit, data.held_out) for batch in part] == [3, 1]
    assert torch.equal(torch.cat([b["x"] for b in contents(data)]), whole["x"])


def test_a_single_sample_serves_as_both_and_the_report_says_so():
    data = read(batches(1, size=1))
    assert torch.equal(data.fit[0].inputs["x"], data.held_out[0].inputs["x"])
    made = Transformer(layers=1).build()
    _, report = Pipeline(["cleanup.dead_code"]).run(made, calibration=batches(1, size=1))
    assert any("no calibration data is held out" in note for note in report.notes)


# -- padding


def values(made: Program, site: str, data, keep) -> torch.Tensor:
    """The inputs of a site as rows, where ``keep(batch)`` [batch, length] is true."""
    rows = []
    for batch in data:
        node = next(n for n in made.main.calls() if n.meta.get("site") == site).args[0]
        found = {}
        run(made.main, batch, observe=lambda n, t, found=found: found.update({n: t}))
        rows.append(found.get(node, batch.get("x"))[keep(batch)])
    return torch.cat(rows)


def tokens(batch) -> torch.Tensor:
    return batch["mask"][:, 0, 0, :]


@pytest.mark.parametrize("site", ["block.0.attention.query", "block.1.ffn.down", "block.1.attention.output"])
def test_padding_is_what_no_query_may_attend_to(site):
    made, data = Transformer(layers=2).build(), batches()
    request = Request(site, MinMax())
    found = calibrate(made, [request], dataset(made, data, held_out=0)).get(request)
    rows = values(made, site, data, tokens)
    assert found.count == len(rows) < 5 * 2 * 6
    torch.testing.assert_close(found.low, rows.amin(0))
    torch.testing.assert_close(found.high, rows.amax(0))


@pytest.mark.parametrize("site", ["block.0.attention.output", "block.1.ffn.down", "block.1.attention.key"])
def test_values_behind_codes_have_the_same_padding(site):
    made, data = Transformer(layers=2).build(), batches()
    quantized, _ = Pipeline(["quantize.rtn", "quantize.static"]).run(made, calibration=data)
    request = Request(site, MinMax())
    found = calibrate(quantized, [request], dataset(made, data, held_out=0)).get(request)
    assert found.count == sum(int(tokens(batch).sum()) for batch in data)


def test_padding_by_an_additive_mask_and_under_a_causal_one():
    def emit(build, x, mask):
        make = Weights(build)
        added = build.where(mask, 0.0, -3e38)
        q, k, v = (make.linear(x, role, WIDTH, WIDTH) for role in ("query", "key", "value"))
        a = build.attention(q, k, v, added, heads=4, kv_heads=4, scale=0.5, causal=True, site="attention")
        return {"y": make.linear(a, "output", WIDTH, WIDTH)}

    made, data = program(emit, mask="padding"), batches()
    request = Request("output", MinMax())
    found = calibrate(made, [request], dataset(made, data, held_out=0)).get(request)
    assert found.count == sum(int(tokens(batch).sum()) for batch in data)


def test_an_encoder_and_a_decoder_have_a_padding_each():
    made = Program()
    function = made.add_function("main")
    shape, keys = Value("float32", (2, 6, WIDTH)), Value("bool", (2, 1, 1, 6))
    source, target, seen, written = (
        function.add_input(name, value)
        for name, value in (("source", shape), ("target", shape), ("seen", keys), ("written", keys))
    )
    build = function.builder()
    make = Weights(build)

    def attend(x, y, mask, site):
        q, k, v = (
            make.linear(z, f"{site}.{role}", WIDTH, WIDTH)
            for z, role in ((x, "query"), (y, "key"), (y, "value"))
        )
        return build.add(x, build.attention(q, k, v, mask, heads=4, kv_heads=4, scale=0.5, site=site))

    encoded = attend(source, source, seen, "encoder")
    decoded = attend(target, target, written, "decoder")
    crossed = attend(decoded, encoded, seen, "cross")
    function.set_outputs({"y": make.linear(crossed, "head", WIDTH, WIDTH)})
    verify(made)
    lengths = torch.tensor([[6, 2], [3, 3]])
    masks = (torch.arange(6) < lengths.unsqueeze(2)).reshape(2, 2, 1, 1, 6)
    x = torch.randn(2, 6, WIDTH)
    data = [{"source": x, "target": x, "seen": masks[0], "written": masks[1]}]
    requests = {
        site: Request(site, MinMax())
        for site in ("encoder.key", "cross.key", "decoder.key", "cross.query", "head")
    }
    found = calibrate(made, requests.values(), dataset(made, data, held_out=0))
    counts = {site: found.get(request).count for site, request in requests.items()}
    assert counts == {"encoder.key": 8, "cross.key": 8, "decoder.key": 6, "cross.query": 6, "head": 6}


def test_the_user_may_name_the_mask():
    made = Transformer(layers=1, mask=None).build()
    data = [b | {"keep": torch.arange(6).expand(2, 6) < 4} for b in batches(mask=False)]
    request = Request("block.0.ffn.up", Moments())
    found = calibrate(made, [request], dataset(made, data, mask="keep", held_out=0)).get(request)
    rows = values(made, "block.0.ffn.up", batches(mask=False), lambda b: torch.arange(6).expand(2, 6) < 4)
    assert found.count == 5 * 2 * 4
    torch.testing.assert_close(found.mean, rows.double().mean(0))
    with pytest.raises(InputError, match="batch 0 lacks 'keep'"):
        dataset(made, batches(mask=False), mask="keep")
    with pytest.raises(InputError, match="the mask 'keep' has shape"):
        dataset(made, [b | {"keep": torch.ones(2)} for b in batches(mask=False)], mask="keep")


def test_a_model_without_masks_has_no_padding():
    made = Transformer(layers=1, mask=None).build()
    request = Request("block.0.ffn.down", Moments())
    assert calibrate(made, [request], dataset(made, batches(mask=False), held_out=0)).get(request).count == 60


# -- statistics


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(1000, 8) * torch.linspace(0.1, 30, 8) + 1


def gathered(statistic, rows: torch.Tensor, parts: int = 7):
    """The statistic of the rows, given in parts."""
    made, generator = statistic.fresh(), torch.Generator().manual_seed(0)
    for part in rows.chunk(parts):
        made.update(part, generator)
    return made


def test_min_max_and_moments(rows):
    found = gathered(MinMax(), rows)
    assert torch.equal(found.low, rows.amin(0)) and torch.equal(found.high, rows.amax(0))
    assert torch.equal(found.absmax, rows.abs().amax(0))
    found, exact = gathered(Moments(), rows), rows.double()
    torch.testing.assert_close(found.mean, exact.mean(0))
    torch.testing.assert_close(found.mean_abs, exact.abs().mean(0))
    torch.testing.assert_close(found.energy, exact.square().mean(0))


def test_the_error_of_a_gram_matrix_is_as_stated(rows):
    found, exact = gathered(Gram(), rows).total, rows.double().T @ rows.double()
    scale = exact.diag().sqrt()
    assert ((found - exact).abs() / torch.outer(scale, scale)).max() <= 1e-5
    assert torch.equal(gathered(Gram(), rows.double(), 1).total, exact)


@pytest.mark.parametrize("parts", [1, 13])
@pytest.mark.parametrize("fraction", [0.9, 0.99, 1.0])
def test_percentiles_are_right_to_within_a_bin(rows, parts, fraction):
    found = gathered(Histogram(), rows.sort(0).values, parts)
    assert found.counts.sum() == rows.numel() and found.reach >= rows.abs().max()
    low, high = found.percentile(fraction)
    tail = (1 - fraction) / 2
    wanted = rows.reshape(-1).quantile(torch.tensor([tail, 1 - tail]))
    assert abs(low - wanted[0]) < 0.2 and abs(high - wanted[1]) < 0.2
    assert found.counts.double() @ found.centers / rows.numel() == pytest.approx(rows.mean().item(), abs=0.01)


def test_a_histogram_of_zeros():
    found = gathered(Histogram(), torch.zeros(20, 4))
    assert found.percentile(0.99) == (0.0, 0.0)


def test_samples_are_rows_with_equal_chances_and_the_same_every_time():
    rows = torch.arange(2000.0).unsqueeze(1)
    first, second = (gathered(Samples(100), rows).rows for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == 100 == len(first.unique()) and bool((first.diff(dim=0) > 0).all())
    assert abs(first.mean().item() - 1000) < 200
    assert torch.equal(gathered(Samples(100), rows[:40]).rows, rows[:40])


def test_samples_of_a_layer_s_input_and_output_are_of_the_same_tokens():
    made = Transformer(layers=1).build()
    asked = [Request("block.0.ffn.up", Samples(9), of=of) for of in ("input", "output")]
    found = calibrate(made, asked, dataset(made, batches()))
    weight, bias = (made.parameters[f"block.0.ffn.up.{n}"].tensor for n in ("weight", "bias"))
    x, y = (found.get(request).rows for request in asked)
    torch.testing.assert_close(x @ weight.T + bias, y)


def test_statistics_are_saved_whole(rows):
    for statistic in (MinMax(), Moments(), Histogram(512), Gram(), Samples(20)):
        filled = gathered(statistic, rows)
        again = statistic.fresh().restore(filled.state())
        assert again == statistic and again.count == filled.count == 1000
        assert all(torch.equal(tensor, again.state()[name]) for name, tensor in filled.state().items())


# -- the sweep


def counting(monkeypatch) -> list[int]:
    """Counts the batches that are run."""
    runs = []
    monkeypatch.setattr(sweep, "run", lambda *a, **k: runs.append(1) or run(*a, **k))
    return runs


def test_one_sweep_serves_all_requests_and_each_split_only_where_asked(monkeypatch):
    made, runs = Transformer(layers=1).build(), counting(monkeypatch)
    data = dataset(made, batches(5))
    sites = ("block.0.attention.query", "block.0.attention.key", "block.0.ffn.up")
    fit = [Request(site, what) for site in sites for what in (MinMax(), Gram(), Samples(4))]
    found = calibrate(made, fit, data)
    assert len(runs) == 4
    assert found.get(fit[0]) is found.get(fit[3]), "queries and keys read the same value"
    judged = Request("block.0.ffn.up", MinMax(), split="held_out")
    calibrate(made, [*fit, judged], data)
    assert len(runs) == 4 + 5


def test_results_are_kept_by_value_and_data(monkeypatch, tmp_path):
    made, runs = Transformer(layers=2).build(), counting(monkeypatch)
    data = dataset(made, batches(5))
    early, late = (Request(f"block.{i}.ffn.up", Gram()) for i in (0, 1))
    first = calibrate(made, [early, late], data, cache=tmp_path).get(early)
    assert len(runs) == 4
    again = calibrate(made, [early, late], dataset(made, batches(5)), cache=tmp_path).get(early)
    assert len(runs) == 4 and torch.equal(first.total, again.total)
    changed = made.copy()
    name = "block.0.ffn.down.weight"
    changed.parameters[name] = changed.parameters[name].tensor * 2
    calibrate(changed, [early], data, cache=tmp_path)
    assert len(runs) == 4, "what lies before the change is the same"
    calibrate(changed, [late], data, cache=tmp_path)
    assert len(runs) == 8
    calibrate(made, [early], dataset(made, batches(6)), cache=tmp_path)
    assert len(runs) == 13, "other data"
    for file in (tmp_path / "statistics").iterdir():
        file.write_bytes(b"damaged")
    calibrate(made, [early], data, cache=tmp_path)
    assert len(runs) == 17


def keep_after_every_batch(monkeypatch) -> None:
    monkeypatch.setattr(store, "PAUSE", 0.0)
    monkeypatch.setattr(store, "COST", float("inf"))


@pytest.mark.parametrize("killed_at", [2, 5])  # while it gathers what to fit to, and what to judge by
def test_a_killed_sweep_goes_on_with_the_next_batch(killed_at, monkeypatch, tmp_path):
    made, runs = Transformer(layers=2).build(), counting(monkeypatch)
    data = dataset(made, batches(6, length=20), held_out=0.34)
    forms = (MinMax(), Moments(), Histogram(64), Gram(), Samples(30))
    asked = [
        Request(f"block.{i}.ffn.up", what, split=split)
        for i in range(2)
        for what in forms
        for split in ("fit", "held_out")
    ]
    whole, counted = calibrate(made, asked, data), sweep.run
    assert len(runs) == 6
    keep_after_every_batch(monkeypatch)

    def killed(*args, **options):
        if len(runs) == killed_at:
            raise KeyboardInterrupt
        return counted(*args, **options)

    runs.clear()
    monkeypatch.setattr(sweep, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(made, asked, data, cache=tmp_path)
    monkeypatch.setattr(sweep, "run", counted)
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    runs.clear()
    resumed = calibrate(made, asked, data, cache=tmp_path)
    assert len(runs) == 6 - killed_at and not list((tmp_path / "unfinished").iterdir())
    for request in asked:
        state, expected = resumed.get(request).state(), whole.get(request).state()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_what_a_sweep_left_serves_the_same_sweep_only(monkeypatch, tmp_path):
    made, runs = Transformer(layers=1).build(), counting(monkeypatch)
    keep_after_every_batch(monkeypatch)
    monkeypatch.setattr(store.Unfinished, "drop", lambda self: None)
    request = Request("block.0.ffn.up", Samples(4))
    data = dataset(made, batches(5))

    def count(*asked, **options) -> int:
        for file in (tmp_path / "statistics").glob("*"):
            file.unlink()
        runs.clear()
        calibrate(made, asked, options.pop("data", data), cache=tmp_path, **options)
        return len(runs)

    assert count(request) == 4 and count(request) == 0
    assert count(request, seed=1) == 4
    assert count(request, Request("block.0.ffn.up", MinMax())) == 4
    assert count(Request("block.0.ffn.down", Samples(4))) == 4
    assert count(request, data=dataset(made, batches(4))) == 3
    for file in (tmp_path / "unfinished").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert count(request) == 4
    monkeypatch.setattr(store, "PAUSE", 1e9)
    assert count(Request("block.0.ffn.up", Samples(5))) == 4
    assert count(Request("block.0.ffn.up", Samples(5))) == 4, "nothing is written before its time"


def test_a_value_that_no_data_reaches_has_no_statistics():
    made = Transformer(layers=1).build()
    data = [{"x": b["x"], "mask": torch.zeros_like(b["mask"])} for b in batches()]
    request = Request("block.0.ffn.up", MinMax())
    assert calibrate(made, [request], dataset(made, data)).get(request) is None


def test_values_that_overflow_are_an_error_with_the_place():
    made = Transformer(layers=1).build()
    data = [b | {"x": b["x"] * 1e30} for b in batches()]
    made.parameters["block.0.ffn.up.weight"] = made.parameters["block.0.ffn.up.weight"].tensor * 1e38
    with pytest.raises(InputError, match="NaN or infinite") as raised:
        calibrate(made, [Request("block.0.ffn.down", MinMax())], dataset(made, data))
    assert "calibration batch 0" in str(raised.value)


def test_requests_for_what_is_not_there():
    made = Transformer(layers=1).build()
    data, request = dataset(made, batches()), Request("block.0.ffn.up", MinMax())
    with pytest.raises(InputError, match="no site 'block.0.ffn.upp'"):
        calibrate(made, [Request("block.0.ffn.upp", MinMax())], data)
    with pytest.raises(PipelineError, match="of another program"):
        calibrate(made.copy(), [Request(made.main.calls("linear")[0], MinMax())], data)
    with pytest.raises(PipelineError, match="was not requested"):
        calibrate(made, [], data).get(request)


# -- block by block


def test_sequential_gives_inputs_under_the_changed_blocks():
    made, data = Transformer(layers=3).build(), batches()
    changed, seen = made.copy(), {}
    for step in sequential(changed, dataset(changed, data, held_out=0)):
        for up in (n for n in step.calls("linear") if n.meta["site"].endswith("ffn.up")):
            request = Request(up, Gram())
            seen[up.meta["site"]] = step.gather([request]).get(request).total
            name = up.args[1].target
            changed.parameters[name] = changed.parameters[name].tensor * 0.5
            after = Request(up, MinMax(), of="output")
            assert step.gather([after]).get(after).count
    assert list(seen) == [f"block.{i}.ffn.up" for i in range(3)]
    untouched = Request("block.1.ffn.up", Gram())
    expected = values(changed, "block.1.ffn.up", data, tokens).double()
    torch.testing.assert_close(seen["block.1.ffn.up"], expected.T @ expected, rtol=1e-4, atol=1e-4)
    original = calibrate(made, [untouched], dataset(made, data, held_out=0)).get(untouched).total
    assert (original - seen["block.1.ffn.up"]).abs().max() > 1e-2


def test_sequential_survives_operations_that_are_replaced():
    made, data = Transformer(layers=2).build(), batches()
    for step in sequential(made, dataset(made, data)):
        for gelu in step.calls("gelu"):
            made.main.replace(gelu, made.main.builder(before=gelu).gelu_tanh(gelu.args[0]))
    verify(made)
    assert not made.main.calls("gelu")


def grams(made: Program, site: str, data) -> torch.Tensor:
    rows = values(made, site, data, tokens).double()
    return rows.T @ rows


@pytest.mark.parametrize(
    "form", [{}, {"post_norm": True}, {"gated": True, "rms": True, "kv_heads": 2}], ids=str
)
def test_layers_that_change_one_after_the_other_cost_one_run_of_their_block(form, monkeypatch):
    made, data, seen, ran = Transformer(layers=3, **form).build(), batches(), {}, Counter()
    compute = interpreter._compute
    for step in sequential(made, dataset(made, data, held_out=0)):
        monkeypatch.setattr(interpreter, "_compute", lambda n, *rest: ran.update([n]) or compute(n, *rest))
        by_input = defaultdict(list)
        for linear in step.calls("linear"):
            by_input[linear.args[0]].append(linear)
        for linears in by_input.values():
            request = Request(linears[0], Gram())
            seen[linears[0].meta["site"]] = step.gather([request]).get(request).total
            for name in (linear.args[1].target for linear in linears):
                made.parameters[name] = made.parameters[name].tensor * 0.5
    monkeypatch.undo()
    assert len(seen) == 12
    for site, total in seen.items():
        torch.testing.assert_close(total, grams(made, site, data), rtol=1e-4, atol=1e-4)
    assert {ran[n] for n in made.main.calls("linear", "attention", "gelu", "silu")} == {len(data)}


def test_a_change_of_what_a_block_has_done_is_noticed():
    made, data = Transformer(layers=2).build(), batches()
    for step in sequential(made, dataset(made, data, held_out=0)):
        by_role = {n.meta["site"].rpartition(".")[2]: n for n in step.calls("linear")}
        if not by_role:
            continue
        step.gather([Request(by_role["down"], Gram())])
        name = by_role["value"].args[1].target
        made.parameters[name] = made.parameters[name].tensor * 3.0
        for role in ("down", "value"):
            total = step.gather([request := Request(by_role[role], Gram())]).get(request).total
            expected = grams(made, by_role[role].meta["site"], data)
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_sequential_refuses_values_of_other_blocks():
    made = Transformer(layers=2).build()
    first = next(iter(sequential(made, dataset(made, batches()))))
    with pytest.raises(PipelineError, match="cannot be gathered in"):
        first.gather([Request("block.1.ffn.down", MinMax())])
    with pytest.raises(PipelineError, match="held_out"):
        first.gather([Request("block.0.ffn.down", MinMax(), split="held_out")])


# -- passes and pipelines


class Clip(Pass):
    """Writes the largest magnitude that it was given into the report, and shrinks a weight by it."""

    calibrated = True
    numerics = Lossy()
    acts_on = ("linear",)

    def requests(self, program):
        return [Request(node, MinMax()) for _, node in self.select(program)]

    def run(self, program, context):
        result = PassResult()
        for _, node in self.select(program):
            found = context.statistics.get(Request(node, MinMax()))
            result.change(node, f"{found.absmax.max():.4f} over {found.count} tokens")
            name = node.args[1].target
            program.parameters[name] = program.parameters[name].tensor * 0.999
        return result


def test_a_pass_gets_what_it_asks_for():
    made = Transformer(layers=1).build()
    _, report = Pipeline([Clip(only="block.0.ffn.up")]).run(made, calibration=batches())
    rows = values(made, "block.0.ffn.up", batches()[:-1], tokens)
    assert report.steps[0].changes[0].reason == f"{rows.abs().max():.4f} over {len(rows)} tokens"


def test_passes_that_need_no_data_get_none():
    seen = []

    class Look(Pass):
        def run(self, program, context):
            seen.append((context.calibration, context.statistics))
            return PassResult()

    Pipeline([Look()]).run(Transformer(layers=1).build(), calibration=batches())
    assert seen == [(None, None)]


def test_without_data_the_error_names_a_recipe_that_needs_none():
    made = Transformer(layers=1).build()
    for pipeline in (Pipeline([Clip()], name="fp320"), Pipeline([Stage("s", (Clip(),))], name="fp320")):
        with pytest.raises(PipelineError, match="recipe 'fp320' needs calibration data") as raised:
            pipeline.run(made)
        assert "clip" in raised.value.why and "'fp32'" in raised.value.fix
    with pytest.raises(PipelineError, match="needs calibration data"):
        tersor.compile(made, recipe=[Clip()])


def test_stages_are_judged_on_what_is_held_out():
    made = Transformer(layers=1).build()
    _, report = Pipeline([Stage("s", (Clip(),))]).run(made, calibration=batches())
    assert report.gates[0].before["cosine"] == pytest.approx(1)
    assert 20 < report.gates[0].after["sqnr_db"] < 100


def test_other_data_is_another_key_for_calibrated_passes_only(tmp_path):
    made = Transformer(layers=1).build()
    for count, cached in ((5, [False, False]), (5, [True, True]), (6, [True, False])):
        context = Context(cache=tmp_path)
        _, report = Pipeline(["fold.key_bias", Clip()]).run(made, context, calibration=batches(count))
        assert [step.cached for step in report.steps] == cached


def test_named_recipes_say_whether_they_need_data():
    assert not any(p.calibrated for p in recipes.get("fp32").passes)


# -- state


def test_programs_that_keep_state_are_measured_from_zeros():
    made = stateful.decoder(functions=("main",))
    inputs = {"x": torch.randn(1, 7, stateful.WIDTH), "position": torch.tensor(0)}
    update = made.main.calls("cache_update")[0]
    request = Request(update, MinMax(), of="output")
    found = calibrate(made, [request], dataset(made, [inputs], held_out=0)).get(request)
    run(made.main, inputs, states := made.zero_states())
    low, high = states[update.args[0].target].flatten(0, 1).aminmax(dim=0)
    torch.testing.assert_close((found.low, found.high), (low, high), check_dtype=False)
    assert len(list(sequential(made, dataset(made, [inputs], held_out=0)))) >= 2


# -- several functions


def test_other_functions_have_the_statistics_of_their_counterparts():
    """A prefill and a step: the same sites, and between them what is computed alike; sizes differ."""
    made = stateful.decoder(functions=("prefill", "decode"))
    prefill, decode = made.functions.values()
    data = dataset(made, [{"x": torch.randn(1, 7, stateful.WIDTH), "position": torch.tensor(0)}], held_out=0)
    for ours in prefill.calls():
        theirs = next(node for node in decode.calls() if node.name == ours.name)
        if ours.meta["value"].is_float:
            requests = [Request(node, MinMax(), of="output") for node in (ours, theirs)]
            found = calibrate(made, requests, data)
            assert found.get(requests[1]) is found.get(requests[0]) is not None


def second(made: Program, emit) -> list[bool]:
    """Whether the values that ``emit(build, x)`` makes in a second function have statistics; ``x`` is like main's."""
    step = made.add_function("step")
    nodes = emit(step.builder(), step.add_input("x", made.main.inputs["x"]))
    step.set_outputs({f"y{i}": node for i, node in enumerate(nodes)})
    requests = [Request(node, MinMax(), of="output") for node in nodes]
    x = made.main.inputs["x"]
    found = calibrate(made, requests, dataset(made, [{"x": torch.randn(x.shape)}], held_out=0))
    return [found.get(request) is not None for request in requests]


def first(emit) -> Program:
    made = Program()
    function = made.add_function("main")
    x = function.add_input("x", Value("float32", (3, 4)))
    function.set_outputs({f"y{i}": node for i, node in enumerate(emit(function.builder(), x))})
    return made


def test_what_several_places_could_be_has_no_counterpart():
    """Two layers of one site and one weight, of which nothing tells which is which, and a layer that main lacks."""
    weights = {name: torch.randn(4, 4) for name in "abc"}

    def layers(build, x, sites: str, known: str = ""):
        for site in sites:
            weight = build.read(site) if site in known else build.parameter(site, weights[site])
            known += site
            yield build.emit("linear", x, weight, site=site)

    made = first(lambda build, x: list(layers(build, x, "abb")))
    assert second(made, lambda build, x: list(layers(build, x, "abc", known="ab"))) == [True, False, False]


def test_data_for_a_later_function_is_told_which_one_it_is_run_through():
    made = stateful.decoder(functions=("decode", "prefill"))
    inputs = {"x": torch.randn(1, 7, stateful.WIDTH), "position": torch.tensor(0)}
    with pytest.raises(InputError) as caught:
        dataset(made, [inputs], held_out=0)
    assert "another function than 'decode'" in caught.value.fix and "name='main'" in caught.value.fix


def test_another_model_is_none_whatever_its_sites_are_called():
    def model(build, x):
        hidden = build.emit("linear", x, build.parameter("w", torch.randn(4, 4)), site="fc1")
        return [hidden, build.emit("relu", hidden, site="act"), build.neg(x)]

    made = first(model)
    assert second(made, model) == [False] * 3


def test_what_is_done_with_other_attributes_is_something_else():
    made = first(lambda build, x: [build.slice(x, dim=1, end=2), build.neg(x)])
    assert second(made, lambda build, x: [build.slice(x, dim=1, start=2), build.neg(x)]) == [False, True]


def test_a_deep_stack_without_sites_takes_no_time():
    def stack(build, x):
        for _ in range(60):
            x = build.add(x, build.relu(x))
        return [x]

    assert second(first(stack), stack) == [True]
