"""List the passes, or show one of them.

tersor passes
tersor passes fold.constants
"""

from __future__ import annotations

import argparse
import inspect

from tersor.cli.output import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this pass in full")


def execute(options: argparse.Namespace) -> int:
    from tersor.passes import registry

    if options.name:
        print(inspect.getdoc(registry.get(options.name)))
        return 0
    known = registry.passes().items()
    table(
        ("pass", "numerics", "what it does"), [(name, cls.numerics, first_line(cls)) for name, cls in known]
    )
    return 0


def first_line(documented: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]
