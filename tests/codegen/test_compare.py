"""The comparison of compiled code with its program: which sizes it tries, what it notices."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.codegen import build, prepare
from tersor.codegen.compare import Observed, compare, probe_sizes, relative_error
from tersor.codegen.observation import with_observers
from tersor.codegen.runtime import load
from tersor.errors import BudgetError, CompileError
from tersor.ir import Dim, Function, Program, Range, Value, run
from tersor.targets import resolve

N = Dim.symbol("n")


def doubling(rows: int = 8) -> Function:
    """y = 2 x, and the first rows of a table, as many as there are positions."""
    function = Program().add_function("main", {"n": Range(1, 8)})
    x = function.add_input("x", Value("float32", (N, 4)))
    build = function.builder()
    taken = build.index_select(build.parameter("table", torch.ones(rows, 4)), build.arange(end=N), dim=0)
    function.set_outputs({"y": build.mul(x, 2.0), "z": build.add(x, taken)})
    return function


def test_programs_of_codes_are_compared_by_their_distance():
    """One code of many may be another; a wrong scale is noticed."""
    function = Program().add_function("main", {"n": Range(200, 200)})
    x = function.add_input("x", Value("float32", (N, 64)))
    function.set_outputs({"y": function.builder().round(x)})

    def moved(by: float, where: slice):
        def call(inputs, states):
            result = run(function, inputs, states)
            result["y"] = result["y"].clone()
            result["y"][where] += by
            return result

        return call

    assert compare(function, moved(1.0, slice(0, 0)))[0].worst == 0
    few = compare(function, moved(1e-2, slice(0, 100)))[0]
    assert 1e-4 < few.worst < 0.0141
    with pytest.raises(BudgetError, match="disagrees"):
        compare(function, moved(1.0, slice(0, 100)))


def test_programs_that_amplify_rounding_are_allowed_what_they_do_themselves():
    """(x + 1e4) - 1e4 keeps few digits of x in float32; behind it, rounding to codes magnifies that."""
    function = Program().add_function("main", {"n": Range(200, 200)})
    x = function.add_input("x", Value("float32", (N, 64)))
    build = function.builder()
    coarse = build.sub(build.add(x, 1e5), 1e5)
    function.set_outputs({"y": build.round(build.mul(coarse, 3.0))})

    def off_by(share: float):
        def call(inputs, states):
            result = run(function, inputs, states)["y"].clone()
            result.view(-1)[: int(share * result.numel())] += 1.0
            return {"y": result}

        return call

    worst = compare(function, off_by(0.002))[0].worst
    assert worst > 0.0141
    with pytest.raises(BudgetError):
        compare(function, off_by(0.5))


def test_the_ends_and_the_middle_of_every_range_are_tried():
    function = Program().add_function("main", {"n": Range(1, 8), "m": Range(3, 3)})
    sizes = probe_sizes(function)
    assert {s["n"] for s in sizes} == {1, 5, 8} and {s["m"] for s in sizes} == {3}
    assert len(sizes) == 3, "each once"


def test_right_code_passes_with_its_errors():
    function = doubling()
    found = compare(function, lambda inputs, states: run(function, inputs, states))
    assert [c.worst for c in found] == [0.0] * len(found) and {c.sizes["n"] for c in found} == {1, 5, 8}


@pytest.mark.parametrize("wrong", [1e-3, math.nan, math.inf])
def test_wrong_code_is_named(wrong):
    function = doubling()

    def broken(inputs, states):
        results = run(function, inputs, states)
        return results | {"z": results["z"] + (wrong if len(inputs["x"]) == 8 else 0.0)}

    with pytest.raises(BudgetError, match="output 'z'.*(\n.*)*'n': 8"):
        compare(function, broken)


def test_a_program_that_does_not_run_is_told_from_wrong_code():
    with pytest.raises(CompileError, match="does not run.*(\n.*)*'n': 8.*(\n.*)*fix"):
        function = doubling(rows=5)
        compare(function, lambda inputs, states: run(function, inputs, states))


def test_errors_are_relative_to_the_scale():
    expected = torch.tensor([100.0, 1.0, math.inf])
    assert relative_error(torch.tensor([100.0, 1.1, math.inf]), expected) == pytest.approx(1e-3)
    assert relative_error(torch.tensor([100.0, 1.0, 5.0]), expected) == math.inf
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf


# -- layer by layer


def integers(layers: int = 6, rows: int = 64, width: int = 64, products: str = "float32") -> Program:
    """Layers of integer products on a residual stream, with norms between, and attention in the first."""
    program = Program()
    function = program.add_function("main", {"n": Range(rows, rows)})
    stream = function.add_input("x", Value("float32", (1, N, width)))
    build = function.builder()
    generator = torch.Generator().manual_seed(0)
    for i in range(layers):
        normed = build.layer_norm(stream, eps=1e-5)
        if i == 0:
            normed = build.attention(
                normed, normed, normed, heads=2, kv_heads=2, scale=0.2, products=products
            )
        codes = build.quantize(normed, build.parameter("s", torch.tensor(0.03)), 128.0, dtype="uint8")
        weight = torch.randint(-127, 128, (width, width), generator=generator, dtype=torch.int8)
        start = -128 * weight.to(torch.int32).sum(1, dtype=torch.int32)
        sums = build.emit(
            "integer_linear",
            codes,
            build.parameter("w", weight),
            build.parameter("k", start),
            site=f"layer.{i}",
        )
        stream = build.add(stream, build.mul(build.cast(sums, dtype="float32"), 1e-4))
    function.set_outputs({"y": stream})
    return program


def wrong(share: float, layer: int, by: int):
    """What an observer returns where a kernel's codes are too large in a share of places."""
    seen = []

    def observe(node, value):
        if node.target.name != "quantize":
            return None
        seen.append(node)
        if len(seen) != layer + 1:
            return None
        changed = value.clone()
        places = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(1))
        changed.view(-1)[places[: int(share * value.numel())]] += by
        return changed

    return observe


def observed_with(program: Program, share: float, layer: int = 2, by: int = 1):
    """The function as compiled code whose kernel is wrong, and the same with its codes."""
    _, observers = with_observers(program)

    def of(function: Function):
        return lambda inputs, states: run(function, inputs, states, observe=wrong(share, layer, by))

    return of(program.main), Observed(observers["main"], of(observers["main"]))


def test_a_kernel_that_is_wrong_in_one_code_of_a_hundred_is_found():
    """The comparison of results alone lets it pass: behind the layers it is a small distance."""
    program = integers()
    compiled, observed = observed_with(program, 0.01)
    assert compare(program.main, compiled)[0].worst > 0
    with pytest.raises(BudgetError, match="40 of 4096 codes are others, by up to 1 .*(\n.*)*main"):
        compare(program.main, compiled, observed=observed)


@pytest.mark.parametrize("share", [0.0, 0.0009])
def test_codes_that_are_next_to_a_rounding_do_not_spread(share):
    """The program goes on with the codes of the compiled code, so its results are equal, not only near."""
    program = integers()
    compiled, observed = observed_with(program, share)
    (found,) = compare(program.main, compiled, observed=observed)
    assert found.worst == 0 and found.codes == {
        "made": 6 * 4096,
        "moved": int(share * 4096),
        "by": int(share > 0),
    }


def test_codes_behind_attention_in_bf16_may_be_what_that_moves():
    program = integers(products="bfloat16")
    compiled, observed = observed_with(program, 0.002, layer=0)
    (found,) = compare(program.main, compiled, observed=observed)
    assert found.codes["moved"] == 8
    compiled, observed = observed_with(program, 0.002, layer=0, by=2)  # noise moves some by 1 already
    (found,) = compare(program.main, compiled, observed=observed)
    assert found.codes["by"] == 2
    for share, layer, by in ((0.5, 0, 1), (0.01, 2, 1), (0.002, 0, 5), (0.0005, 2, 2)):
        compiled, observed = observed_with(program, share, layer, by)
        with pytest.raises(BudgetError, match="codes are others"):
            compare(program.main, compiled, observed=observed)


def test_zero_points_found_at_run_time_are_given_too():
    """One zero point rounded to the other side of a half moves every code of a tensor; it is one value that differs."""
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (4, 8)))
    build = function.builder()
    zero = build.round(build.mul(build.amax(x, dims=(0, 1)), 40.0))
    codes = build.quantize(x, build.parameter("s", torch.tensor(0.05)), zero, dtype="uint8")
    weight = build.parameter("w", torch.ones(2, 8, dtype=torch.int8))
    function.set_outputs({"y": build.integer_linear(codes, weight)})
    _, observers = with_observers(program)

    def of(function: Function):
        def one_more(node, value):
            return value + 1 if node.target.name == "round" else None

        return lambda inputs, states: run(function, inputs, states, observe=one_more)

    observed = Observed(observers["main"], of(observers["main"]))
    (found,) = compare(function, of(function), observed=observed)
    assert found.codes == {"made": 33, "moved": 1, "by": 1} and found.worst == 0


def test_data_is_compared_besides_random_inputs():
    program = integers()
    compiled, observed = observed_with(program, 0.0)
    batch = {"x": torch.full((1, 64, 64), 0.5)}
    assert len(compare(program.main, compiled, observed=observed, batches=[batch, batch])) == 3


def test_artifacts_are_compared_layer_by_layer_and_hold_no_observers(tmp_path):
    program = integers(layers=3)
    batch = {"x": torch.zeros(1, 64, 64)}
    build(prepare(program, resolve("native")), tmp_path / "a.tersor", batches={"main": [batch]})
    compiled = load(tmp_path / "a.tersor")
    first, second = compiled.manifest.errors["main"]
    assert first["codes"]["made"] == 3 * 4096 and first["codes"]["moved"] <= 12 and first["codes"]["by"] <= 1
    assert first["errors"]["y"] < 1e-5 and second["codes"]["moved"] == 0
    assert list(compiled.manifest.functions) == ["main"]
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(2))
    near = torch.nn.functional.cosine_similarity(
        torch.as_tensor(compiled(x=x)["y"]), program(x=x)["y"], dim=-1
    )
    assert near.min() > 0.9999
