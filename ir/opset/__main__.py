"""``python -m tersor.ir.opset`` prints the dialect as the table in docs/program.md."""

from __future__ import annotations

import inspect
from itertools import groupby

from tersor.ir import ops
from tersor.ir.dialect import Op


def builtin_ops() -> list[Op]:
    """The operations that third parties did not add."""
    return [op for op in ops if (op.reference.__module__ or "").startswith("tersor.ir.opset.")]


def table() -> str:
    """One Markdown table per module of this package: operation, operands, attributes, meaning."""
    parts = []
    for module, group in groupby(builtin_ops(), key=lambda op: op.reference.__module__.rpartition(".")[2]):
        rows = [
            f"| `{op.name}` | {_operands(op)} | {_attributes(op)} | {op.doc.splitlines()[0]} |"
            for op in group
        ]
        head = ["| operation | operands | attributes | meaning |", "|---|---|---|---|"]
        parts.append(
            "\n".join([f"### {module}", "", *head, *(row.replace("|x|", "\\|x\\|") for row in rows)])
        )
    return "\n\n".join(parts)


def _operands(op: Op) -> str:
    """Names; those that may be left out in brackets."""
    parameters = op.signature.parameters
    return ", ".join(n if parameters[n].default is inspect.Parameter.empty else f"[{n}]" for n in op.operands)


def _attributes(op: Op) -> str:
    """Names, with their defaults."""
    return ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={default}"
        for name, default in op.attributes.items()
    )


if __name__ == "__main__":
    print(table())
