"""Tables of embeddings in codes, and their rows looked up in codes."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program, cost
from tersor.passes import Context, Fidelity, Pipeline
from tersor.passes.analysis import analyze
from tersor.passes.quantize.bf16 import BFloat16
from tersor.passes.quantize.embeddings import EmbeddingTables
from tersor.passes.quantize.fp16 import Float16
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.integers import IntegerProducts
from tersor.passes.recipes import RECIPES, get
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import Weights, program

WIDTH, ROWS = 16, 40
ALL = EmbeddingTables(smallest=0)


def words(form: str = "wide", group: int | None = None, rows: int = ROWS) -> Program:
    """Rows of a table, chosen by the input: "wide", "coded" (decoded whole) or "rows" (decoded when they are read)."""

    def emit(build, x, mask):
        table, ids = Weights(build).tensor(rows, WIDTH), build.argmax(x, dim=-1)
        if form == "wide":
            return {"y": build.embedding(ids, build.parameter("t", table), site="words")}
        scale, _ = Grid().fit_rows(table, group)
        spread = scale[:, None] if group is None else scale.repeat_interleave(group, -1)
        codes = build.parameter("t.codes", torch.round(table / spread).to(torch.int8))
        if form == "coded":
            how = {"axis": 0} if group is None else {"group": group}
            whole = build.dequantize(codes, build.parameter("t.scale", scale), **how)
            return {"y": build.embedding(ids, whole, site="words")}
        stored = build.parameter("t.scales", scale if group else scale[:, None])
        read = build.index_select(stored, ids, dim=0)
        found = build.emit("embedding", ids, codes, site="words")
        return {"y": build.dequantize(found, read, **({"group": group} if group else {}))}

    return program(emit)


def reasons(pass_, made: Program) -> list[str]:
    return [skip.reason for skip in Pipeline([pass_]).run(made)[1].steps[0].skips]


def rows(made: Program) -> torch.Tensor:
    """What a program looks up at every position of its table."""
    return made(x=torch.eye(WIDTH).reshape(1, WIDTH, WIDTH))["y"]


@pytest.mark.parametrize("group", [None, 4])
def test_tables_become_codes(group):
    pass_ = EmbeddingTables(group=group, smallest=0)
    check_pass(pass_, words(), words("coded", group), unmatched=words("coded"))


@pytest.mark.parametrize("group", [None, 4])
def test_rows_are_looked_up_in_codes_and_are_the_same(group):
    coded = words("coded", group)
    after = check_pass(IntegerProducts(), coded, words("rows", group), unmatched=words())
    assert torch.equal(rows(after), rows(coded))


def test_rows_are_off_by_half_a_step():
    after, report = Pipeline([ALL, "quantize.integers"]).run(words())
    step = words("coded").parameters["t.scale"].tensor[:WIDTH, None]
    assert ((rows(after) - rows(words())).abs() <= 0.5001 * step).all()
    (said,) = report.steps[0].changes
    assert said.site == "words" and 0 < said.figures["weight_error"] < 1e-4
    assert said.figures["bytes_before"] == 4 * ROWS * WIDTH
    assert said.figures["bytes_after"] == after.parameters.bytes == ROWS * (WIDTH + 4)


def test_only_the_rows_that_are_read_count_as_moved():
    sizes = {"batch": 1, "length": 1}
    moved = {form: cost(words(form, rows=4096), sizes).bytes for form in ("wide", "coded", "rows")}
    assert moved["rows"] < 2 * moved["wide"] < moved["coded"] / 100


@pytest.mark.parametrize(
    ("scale", "zero", "form"),
    [
        (torch.tensor(0.02), 7.0, {}),
        (torch.linspace(0.01, 0.02, ROWS), torch.arange(float(ROWS)), {"axis": -2}),
        (torch.linspace(0.01, 0.02, WIDTH), None, {"axis": 1}),
        (torch.linspace(0.01, 0.02, ROWS)[:, None], None, {}),
        (torch.linspace(0.01, 0.02, ROWS), 3.0, {"axis": 0}),
    ],
    ids=["one", "per row with zero points", "per column", "a column", "one zero point"],
)
def test_every_form_of_scales_is_the_same_afterwards(scale, zero, form):
    def emit(build, x, mask):
        codes = torch.randint(-128, 128, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
        stored = [build.parameter("t.codes", codes.to(torch.int8)), build.parameter("t.scale", scale)]
        stored += [build.parameter("t.zero", zero) if isinstance(zero, torch.Tensor) else zero]
        return {
            "y": build.embedding(build.argmax(x, dim=-1), build.dequantize(*stored, **form), site="words")
        }

    made = program(emit)
    after = apply(IntegerProducts(), made)
    (found,) = after.main.calls("embedding")
    assert found.meta["value"].dtype == "int8" and found.meta["site"] == "words"
    assert torch.equal(rows(after), rows(made))


def test_two_look_ups_share_a_table_and_its_scales():
    def emit(build, x, mask):
        table = Weights(build)("t", ROWS, WIDTH)
        places = build.argmax(x, dim=-1), build.argmax(build.neg(x), dim=-1)
        return {f"y{i}": build.embedding(ids, table, site=f"words.{i}") for i, ids in enumerate(places)}

    after, report = Pipeline([ALL, "quantize.integers"]).run(program(emit))
    assert set(after.parameters) == {"t.codes", "t.scales"}
    assert [change.site for change in report.steps[1].changes] == ["words.0", "words.1"]


def tied(rows: int = ROWS) -> Program:
    """A table that the output projection reads, too."""

    def emit(build, x, mask):
        table = Weights(build)("t", rows, WIDTH)
        found = build.embedding(build.argmax(x, dim=-1), table, site="words")
        return {"y": build.linear(found, table, site="head")}

    return program(emit)


def test_a_tied_table_stays_wide_and_the_report_says_why():
    assert reasons(ALL, tied()) == ["its weight is also read by head (linear)"]
    assert reasons(IntegerProducts(), tied()) == ["it is not quantized"] * 2


def test_a_tied_table_can_give_its_codes_to_both():
    pass_ = EmbeddingTables(smallest=0, tied=True)
    after = check_pass(pass_, tied(), None, unmatched=words("coded"))
    assert set(after.parameters) == {"t.codes", "t.scale"}
    assert reasons(EmbeddingTables(smallest=0, tied=True, skip=("head",)), tied()) == [
        "head (linear) is to keep it"
    ]
    whole, report = Pipeline([pass_, "quantize.rtn", "quantize.dynamic", "quantize.integers"]).run(tied())
    assert "t" not in whole.parameters and whole.main.calls("integer_linear")
    assert [(c.site, c.reason) for c in report.steps[0].changes] == [
        ("head", "the codes of words"),
        ("words", "weights in 8 bits per row"),
    ]
    exact, found = (made(x=torch.eye(WIDTH)[None])["y"] for made in (tied(), whole))
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_a_small_table_stays_wide():
    assert reasons(EmbeddingTables(), words()) == ["its 40 rows take 2.6 kB only"]
    with pytest.raises(PipelineError, match="negative"):
        EmbeddingTables(smallest=-1)


@pytest.mark.parametrize(("pass_", "short"), [(BFloat16(), "bf16"), (Float16(), "fp16")])
def test_tables_of_16_bits_are_widened_where_they_are_read(pass_, short):
    made = words(rows=2048)
    after = check_pass(pass_, made, None, unmatched=words())
    (found,) = after.main.calls("embedding")
    (user,) = found.users
    assert (
        found.meta["site"] == "words"
        and user.target.name == "cast"
        and set(after.parameters) == {f"t.{short}"}
    )
    table = made.parameters["t"].tensor.to(after.parameters[f"t.{short}"].tensor.dtype).float()
    assert torch.equal(rows(after)[0], table[:WIDTH])
    assert reasons(pass_, words()) == ["its 40 rows take 2.6 kB only"]


def test_a_table_beyond_fp16_stays_wide():
    made = words(rows=2048)
    made.parameters["t"] = made.parameters["t"].tensor * 1e6
    assert "beyond 65504" in reasons(Float16(), made)[0]


def encoder() -> Program:
    """A table and a layer behind it."""

    def emit(build, x, mask):
        make = Weights(build)
        read = build.embedding(build.argmax(x, dim=-1), make("t", 2048, WIDTH), site="words")
        return {"y": make.linear(build.add(read, x), "layer", 8, WIDTH)}

    return program(emit)


def data(count: int = 10) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(2, 8, WIDTH, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"min_sqnr_db": 200}, 32),
        ({"min_sqnr_db": 64}, 16),
        ({"min_sqnr_db": 25}, 8),
        ({"max_bytes": 45_000}, 8),
    ],
)
def test_a_plan_chooses_the_form_of_a_table_as_of_a_layer(options, bits):
    after, report = Pipeline([{"pass": "quantize.mixed", **options}]).run(encoder(), calibration=data())
    (step,) = report.steps
    (said,) = [f for f in (*step.changes, *step.skips) if f.site == "words"]
    assert said.figures["bits"] == bits
    assert ("t" in after.parameters, "t.bf16" in after.parameters, "t.codes" in after.parameters) == (
        bits == 32,
        bits == 16,
        bits == 8,
    )
    if "min_sqnr_db" in options:
        judge = Fidelity(encoder(), data())
        assert bits == 32 or judge(after)["sqnr_db"] >= options["min_sqnr_db"]


def test_an_analysis_says_what_a_table_loses():
    row = analyze(encoder(), data())["words"]
    assert row.op == "embedding" and row.macs == 0 and row.outcomes.keys() == {"int8", "int8-dynamic", "bf16"}
    found = {scheme: outcome.sqnr_db for scheme, outcome in row.outcomes.items()}
    assert 40 < found["int8"] == found["int8-dynamic"] < found["bf16"] < 65
    assert row.bytes == 4 * 2048 * WIDTH and row.outcomes["int8"].bytes == 2048 * (WIDTH + 4)
    assert row.outcomes["bf16"].bytes == row.bytes // 2
    assert analyze(words(), data()).skipped == {"words": "its 40 rows take 2.6 kB only"}


def test_recipes_store_tables_in_as_many_bits_as_weights():
    made, stored = words(rows=2048), {"bf16": "t.bf16", "fp16": "t.fp16"}
    for name in RECIPES:
        calibrated = name in ("int8", "int8-gptq", "int8-mixed")
        after, _ = get(name).run(made, Context(), calibration=data() if calibrated else None)
        coded = "t.codes" if name.startswith("int8") else "t"
        assert stored.get(name, coded) in after.parameters, name
    wide, _ = get("int8-dynamic").remove("quantize.embeddings").run(made)
    assert set(wide.parameters) == {"t"}
