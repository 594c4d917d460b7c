"""What estimates are told that a function multiplies."""

from __future__ import annotations

import pytest

from tersor.codegen.export.work import described
from tersor.ir import Program, Value
from tersor.passes import recipes
from tests.ir import small_models


@pytest.mark.parametrize(("recipe", "dtype"), [("none", "float32"), ("bf16", "float32"), ("fp16", "float16")])
def test_attention_counts_as_what_arm_kernels_multiply(recipe, dtype):
    program, _ = recipes.get(recipe).run(small_models.bert())
    without_weights = {row["dtype"] for row in described(program.main) if row["weights"] == 0}
    assert program.main.calls("attention") and without_weights == {dtype}


def test_attention_on_codes_counts_as_products_of_int8():
    program = Program()
    function = program.add_function("main", {})
    codes = function.add_input("codes", Value("uint8", (1, 5, 16)))
    scale = function.add_input("scale", Value("float32", (2,)))
    mixed = function.builder().integer_attention(codes, codes, codes, scale, scale, heads=2, kv_heads=2)
    function.set_outputs({"y": mixed})
    assert [row["dtype"] for row in described(function)] == ["int8"]
