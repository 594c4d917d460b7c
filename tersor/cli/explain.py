"""Show what compiling would do, without doing it.

tersor explain --recipe fp32 --target x86-64-v3
"""

from __future__ import annotations

import argparse

from tersor.cli import options as shared


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_recipe(parser)
    shared.add_target(parser)


def execute(options: argparse.Namespace) -> int:
    import tersor

    print(tersor.explain(options.recipe, target=options.target))
    return 0
