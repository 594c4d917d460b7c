"""Folds that move scales behind norms and adapters into layers."""

from __future__ import annotations

import pytest
import torch

from tersor.ir import Program
from tersor.passes import Pipeline
from tersor.passes.fold.gamma_migration import GammaMigration
from tersor.passes.fold.lora import FoldLora
from tersor.passes.quantize.grid import Grid
from tersor.passes.smooth.smoothquant import SmoothQuant
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import Transformer, Weights, program

WIDTH = 16


def reasons(pass_, made: Program) -> dict[str, str]:
    _, report = Pipeline([pass_]).run(made)
    return {skip.site: skip.reason for skip in report.steps[0].skips}


# -- gamma migration


def normed(
    gamma: torch.Tensor, *, residual: bool, kind: str = "layer_norm", migrated: bool = False
) -> Program:
    """A norm into a linear layer, and into a sum where ``residual``; ``migrated`` writes the expected result."""
    width = len(gamma)

    def emit(build, x, mask):
        make = Weights(build)
        beta, weight = make.tensor(width), make.tensor(8, width)
        moved = gamma.abs() > 1e-3 * gamma.abs().max()
        s = torch.where(moved, gamma, 1.0) if migrated else torch.ones(width)
        operands = [build.parameter("norm.weight", gamma / s)]
        if kind == "layer_norm":
            operands.append(build.parameter("norm.bias", beta / s))
        norm = kept = getattr(build, kind)(x, *operands, site="norm")
        if migrated and residual:
            kept = build.mul(norm, build.parameter("norm.residual.scale", s))
        results = {"sum": build.add(kept, x, site="sum")} if residual else {}
        bias = build.parameter("b", make.tensor(8))
        return results | {"y": build.linear(norm, build.parameter("w", weight * s), bias, site="linear")}

    return program(emit, width=width)


GAMMA = torch.tensor([2.0, -0.5, 0.0, 30.0, 1e-6, 1.0, -8.0, 0.1])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gamma_moves_also_where_it_is_negative_and_stays_where_it_is_negligible(kind, residual):
    check_pass(
        GammaMigration(),
        normed(GAMMA, residual=residual, kind=kind),
        normed(GAMMA, residual=residual, kind=kind, migrated=True),
        unmatched=program(lambda build, x, mask: {"y": build.layer_norm(x, site="norm")}, width=8),
    )


@pytest.mark.parametrize("style", [{}, {"post_norm": True}, {"rms": True, "gated": True, "bias": False}])
def test_gamma_of_whole_models_moves(style):
    made = Transformer(layers=2, **style).build()
    after = apply(GammaMigration(), made)
    moved = [p.tensor for name, p in after.parameters.items() if name.endswith("norm.weight")]
    assert all((gamma == 1).all() for gamma in moved[: len(moved) - bool(style.get("post_norm"))])
    assert apply(GammaMigration(), after) is after


def test_gamma_migration_cuts_the_error_of_planted_gammas():
    width, bits = 256, 6
    gamma = torch.ones(width)
    gamma[:3] = 15.0

    def emit(build, x, mask):
        make = Weights(build)
        norm = build.layer_norm(
            x, build.parameter("norm.weight", gamma), make("norm.bias", width), site="norm"
        )
        return {"y": make.linear(norm, "linear", 128, width), "sum": build.add(norm, x)}

    made = program(emit, width=width)
    x = torch.randn(16, 64, width)
    errors = []
    for version in (made, apply(GammaMigration(), made)):
        norm, linear = version.main.calls("layer_norm")[0], version.main.calls("linear")[0]
        gammas, betas = (version.main.parameter(operand) for operand in norm.args[1:3])
        weight = version.main.parameter(linear.args[1])
        rows = torch.nn.functional.layer_norm(x, (width,), gammas, betas).reshape(-1, width)
        grid, steps = Grid(bits, symmetric=False), Grid(bits).fit_rows(weight)[0].unsqueeze(1)
        rounded = grid.round_trip(rows, *grid.fit(rows.min(), rows.max()))
        exact = rows @ weight.T
        errors.append(
            (
                (rounded @ Grid(bits).round_trip(weight, steps).T - exact).square().sum()
                / exact.square().sum()
            ).item()
        )
    assert errors[0] / errors[1] >= 2.9


def test_migration_before_smoothquant_changes_nothing_in_pre_norm_models():
    """gamma (|x| / gamma)^a / (|w| gamma)^(1 - a) = |x|^a / |w|^(1 - a)."""
    made = normed(torch.tensor([2.0, 0.5, 3.0, 30.0, 0.7, 1.0, 8.0, 0.4]), residual=False)
    batches = [{"x": torch.randn(2, 16, 8).clamp(-2, 2)} for _ in range(5)]
    for alpha in (0.3, 0.5, 0.8):
        smooth = SmoothQuant(alpha=alpha)
        direct, _ = Pipeline([smooth]).run(made, calibration=batches)
        migrated, _ = Pipeline([GammaMigration(), smooth]).run(made, calibration=batches)
        for name in ("w", "norm.weight", "norm.bias"):
            torch.testing.assert_close(direct.parameters[name].tensor, migrated.parameters[name].tensor)


def test_norms_that_migration_leaves_alone_have_a_reason():
    found = reasons(GammaMigration(skip="block.0.ffn.up"), Transformer(layers=1, head_norm=True).build())
    assert found["block.0.attention.query_norm"] == "no linear layer with plain weights reads it"
    assert found["block.0.ffn.norm"] == "it would change block.0.ffn.up, named in skip="


# -- adapters


def adapted(
    *,
    merged: bool = False,
    scale: float | None = 2.0,
    bias: bool = True,
    adapter_bias: bool = False,
    swapped: bool = False,
) -> Program:
    """Two layers with an adapter each; ``merged`` writes the expected result."""

    def emit(build, x, mask):
        make = Weights(build)
        results = {}
        for name in ("q", "v"):
            w, b = make.tensor(8, WIDTH), make.tensor(8)
            down, up, inner, outer = make.tensor(3, WIDTH), make.tensor(8, 3), make.tensor(3), make.tensor(8)
            factor = scale or 1.0
            given = b if bias else torch.zeros(8)
            if merged:
                w = w + factor * up @ down
                given = given + factor * (up @ inner + outer) if adapter_bias else given
            has_bias = bias or (merged and adapter_bias)
            y = build.linear(
                x,
                build.parameter(f"{name}.weight", w),
                build.parameter(f"{name}.bias", given) if has_bias else None,
                site=name,
            )
            if not merged:
                biases = [
                    build.parameter(f"{name}.{k}", t) if adapter_bias else None
                    for k, t in (("i", inner), ("o", outer))
                ]
                low = build.linear(x, build.parameter(f"{name}.a", down), biases[0], site=f"{name}.down")
                delta = build.linear(low, build.parameter(f"{name}.b", up), biases[1], site=f"{name}.up")
                if scale is not None:
                    delta = build.mul(delta, scale)
                y = build.add(delta, y) if swapped else build.add(y, delta)
            results[name] = y
        return results

    return program(emit)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": None},
        {"bias": False},
        {"adapter_bias": True},
        {"bias": False, "adapter_bias": True},
        {"swapped": True},
    ],
    ids=str,
)
def test_adapters_merge(options):
    check_pass(
        FoldLora(),
        adapted(**options),
        adapted(**options, merged=True),
        unmatched=Transformer(layers=1).build(),
    )


def test_two_adapters_of_one_layer_merge():
    def emit(build, x, mask):
        make = Weights(build)
        y = make.linear(x, "layer", 8, WIDTH)
        for name in ("first", "second"):
            delta = make.linear(
                make.linear(x, f"{name}.a", 2, WIDTH, bias=False), f"{name}.b", 8, 2, bias=False
            )
            y = build.add(y, build.mul(delta, 0.5))
        return {"y": y}

    after = apply(FoldLora(), program(emit))
    assert [n.target.name for n in after.main.calls()] == ["linear"]


def test_functions_that_share_a_layer_merge_together():
    made = adapted()
    other = made.main.copy(made.parameters)
    other.name = "decode"
    made.functions["decode"] = other
    after = apply(FoldLora(), made)
    assert all([n.target.name for n in f.calls()] == ["linear", "linear"] for f in after.functions.values())
    assert len(after.parameters) == 4


class Adapted(torch.nn.Module):
    """A layer as adapter libraries wrap it."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(WIDTH, 8)
        self.dropout = torch.nn.Dropout(0.1)
        self.lora_a, self.lora_b = torch.nn.Linear(WIDTH, 2, bias=False), torch.nn.Linear(2, 8, bias=False)
        self.scaling = 4.0

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(self.dropout(x))) * self.scaling


def test_a_captured_module_with_an_adapter_becomes_one_layer():
    import tersor

    after = apply(FoldLora(), tersor.capture(Adapted().eval(), {"x": torch.randn(2, WIDTH)}))
    assert [n.target.name for n in after.main.calls()] == ["linear"]


def unmergeable(obstacle: str) -> Program:
    def emit(build, x, mask):
        make = Weights(build)
        weight = build.abs(make("w", 8, WIDTH)) if obstacle == "computed" else make("w", 8, WIDTH)
        y = build.linear(x, weight, site="layer")
        low = make.linear(
            build.neg(x) if obstacle == "input" else x, "down", 3 if obstacle != "wide" else 8, WIDTH
        )
        if obstacle == "between":
            low = build.relu(low)
        delta = make.linear(low, "up", 8, 3 if obstacle != "wide" else 8)
        results = {"y": build.add(y, delta, site="sum")}
        if obstacle == "read":
            results["base"] = y
        if obstacle == "tied":
            results["other"] = build.linear(build.neg(x), weight, site="other")
        return results

    return program(emit)


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("computed", "is computed, not a parameter"),
        ("read", "is also read by"),
        ("tied", "also read by other"),
        ("input", None),
        ("wide", None),
        ("between", None),
    ],
)
def test_what_is_no_adapter_stays(obstacle, reason):
    made = unmergeable(obstacle)
    after, report = Pipeline([FoldLora()]).run(made)
    assert after is made
    assert reason is None or any(reason in skip.reason for skip in report.steps[0].skips)
