"""What estimates are told that a function multiplies."""

from __future__ import annotations

import pytest

from tersor.codegen.export.work import described
from tersor.passes import recipes
from tests.ir import small_models


@pytest.mark.parametrize(("recipe", "dtype"), [("none", "float32"), ("bf16", "float32"), ("fp16", "float16")])
def test_attention_counts_as_what_arm_kernels_multiply(recipe, dtype):
    program, _ = recipes.get(recipe).run(small_models.bert())
    without_weights = {row["dtype"] for row in described(program.main) if row["weights"] == 0}
    assert program.main.calls("attention") and without_weights == {dtype}
