"""docs/program.md: its Python runs, and its table of operations is the dialect's."""

from __future__ import annotations

import re

import pytest

from tersor.ir import ops
from tersor.ir.opset.__main__ import builtin_ops, table


def test_the_page_runs(root, monkeypatch, capsys):
    monkeypatch.setattr(ops, "_ops", dict(ops._ops))  # the page's operation does not stay
    page = (root / "docs/program.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(code) == 5
    names: dict = {}
    for number, block in enumerate(code):
        exec(compile(block, f"program.md, block {number + 1}", "exec"), names)
    printed = capsys.readouterr().out
    shown = re.search(r"^    main\(.*?\n\n", page, re.MULTILINE | re.DOTALL).group()
    assert re.sub(r"^    ", "", shown, flags=re.MULTILINE).strip() in printed
    assert "+%gelu_tanh' = gelu_tanh(%linear)" in printed and "mlp.up up float32[batch, 256]" in printed
    function = names["Program"]().add_function("main")
    x = function.add_input("x", names["Value"]("float32", (3,)))
    function.set_outputs({"y": function.builder().emit("mylib.squared_relu", x, scale=0.5)})


def test_the_table_is_the_dialect(root):
    assert (root / "docs/program.md").read_text(encoding="utf-8").endswith(table() + "\n"), (
        "write the table again with: python -m tersor.ir.opset"
    )


@pytest.mark.parametrize("op", builtin_ops(), ids=lambda op: op.name)
def test_every_row_says_something(op):
    first = op.doc.splitlines()[0]
    assert first.endswith((".", ")", "]", "'.")) or "->" in first, "the first line is the table's"
    assert len(first) < 120
