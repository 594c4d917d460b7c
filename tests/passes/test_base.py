"""The contract: configuration, selection of places, rewriting by rules."""

from __future__ import annotations

from typing import Literal

import pytest

from tersor.errors import InputError, PipelineError
from tersor.ir.matching import P, Rule
from tersor.passes import Equivalent, Lossy, Pass, PassResult, Pipeline
from tests.passes.programs import Transformer


class Tune(Pass):
    """Has an option of each kind."""

    alpha: float | Literal["auto"] = "auto"
    bits: int = 8
    name_of_it: str | None = None
    exact: bool = False
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 1.0)

    def problem(self):
        return "bits should be 4 or 8" if self.bits not in (4, 8) else None

    def run(self, program, context):
        return PassResult()


def test_the_configuration_is_the_pass():
    tuned = Tune(alpha=1, sizes=[3, 4], pair=["b", 2], only="block.*")
    assert tuned.alpha == 1.0 and isinstance(tuned.alpha, float)
    assert (tuned.sizes, tuned.pair, tuned.only) == ((3, 4), ("b", 2.0), ("block.*",))
    assert tuned == Tune(alpha=1.0, sizes=(3, 4), pair=("b", 2.0), only=("block.*",)) != Tune()
    assert Tune.from_config(tuned.config()) == tuned and hash(Tune.from_config(tuned.config())) == hash(tuned)
    assert str(tuned) == "tune(only=['block.*'], alpha=1.0, sizes=[3, 4], pair=['b', 2.0])"
    with pytest.raises(AttributeError):
        tuned.bits = 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "atuo"}, "alpha = 'atuo' should be a number or one of 'auto'"),
        ({"bits": True}, "bits = True should be a whole number"),
        ({"bits": 8.0}, "bits = 8.0 should be a whole number"),
        ({"exact": 1}, "exact = 1 should be true or false"),
        ({"sizes": 3}, "sizes = 3 should be a list"),
        ({"sizes": [1, "a"]}, "should be a list of a whole number"),
        ({"pair": ["b"]}, "should be a list of 2"),
        ({"name_of_it": 3}, "should be a string or None"),
        ({"bits": 3}, "bits should be 4 or 8"),
        ({"only": [1]}, "only = [1] should be a list of a string or None"),
        (
            {"bits": "x", "exact": "y"},
            "bits = 'x' should be a whole number; exact = 'y' should be true or false",
        ),
    ],
)
def test_a_wrong_configuration_says_what_would_be_right(options, message):
    with pytest.raises(PipelineError) as raised:
        Tune(**options)
    assert message in str(raised.value)


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(PipelineError, match="has no option 'alhpa'") as raised:
        Tune.from_config({"alhpa": 1.0})
    assert raised.value.fix == "did you mean 'alpha'?"


def test_a_stage_outside_the_canonical_order_is_refused():
    with pytest.raises(PipelineError, match="'folding', which does not exist"):

        class Wrong(Pass):
            """Misspelt."""

            stage = "folding"


def test_a_pass_without_run_cannot_be_made():
    class Empty(Pass):
        """Nothing in it."""

    with pytest.raises(TypeError, match="abstract class Empty .* run"):
        Empty()


def test_selection_by_given_and_by_structural_names():
    made = Transformer(layers=2).build()
    for node in made.main.calls("linear"):
        node.meta["site"] = (
            node.meta["site"].replace("block.", "encoder.layers.").replace("attention", "attn")
        )

    def linears(**choice):
        return [node.meta["site"] for _, node in Tune(**choice).select(made, "linear")]

    assert linears(only="encoder.layers.1.attn.key") == linears(only="block.1.attention.key")
    assert linears(only="*.key") == ["encoder.layers.0.attn.key", "encoder.layers.1.attn.key"]
    assert len(linears(skip="block.0.*")) == 6
    assert linears(only="*.key", skip="*layers.0.*") == ["encoder.layers.1.attn.key"]
    assert len(linears()) == 12
    with pytest.raises(InputError, match="no site"):
        linears(only="block.1.atention.key")


def test_a_pattern_that_fits_nothing_is_reported():
    _, report = Pipeline([{"pass": "fold.key_bias", "only": ["decoder.*"]}]).run(
        Transformer(layers=1).build()
    )
    assert [(s.site, s.reason) for s in report.steps[0].skips] == [
        ("decoder.*", "no site of the program fits this pattern of only=")
    ]


def test_rules_rewrite_the_selected_places():
    class Tanh(Pass):
        """gelu(x)  ->  gelu_tanh(x)."""

        numerics = Lossy()
        acts_on = ("gelu",)

        def run(self, program, context):
            x = P.any("x")
            return self.rewrite(program, Rule(self.name, P.gelu(x), lambda build, m: build.gelu_tanh(m["x"])))

    made = Transformer(layers=2).build()
    everywhere, report = Pipeline([Tanh()]).run(made)
    assert len(everywhere.main.calls("gelu_tanh")) == len(report.steps[0].changes) == 2
    one, report = Pipeline([Tanh(only="block.1.*")]).run(made)
    assert (len(one.main.calls("gelu")), len(one.main.calls("gelu_tanh"))) == (1, 1)
    assert not report.steps[0].skips
    assert one.main.calls("gelu_tanh")[0].meta["made_by"] == "tanh"
    assert [(c.site, c.reason) for c in report.steps[0].changes] == [("block.1.ffn.activation", "tanh")]


def test_facts_are_sets_however_they_are_written():
    class Needs(Pass):
        """Names facts in three ways."""

        requires = ["masked"]
        forbids = "quantized"
        numerics = Equivalent()

    assert Needs.requires == {"masked"} and Needs.forbids == {"quantized"}
