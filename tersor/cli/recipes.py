"""List the recipes (pipelines by name, for --recipe), or show the steps of one.

tersor recipes
tersor recipes fp32
"""

from __future__ import annotations

import argparse

from tersor.cli.output import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show the steps of this recipe, or of a .toml file"
    )


def execute(options: argparse.Namespace) -> int:
    from tersor.passes import recipes

    if options.name:
        print(recipes.get(options.name).explain())
        return 0
    rows = [(name, len(recipes.get(name).passes), recipes.describe(name)) for name in recipes.names()]
    table(("recipe", "passes", "what it is for"), rows, right=("passes",))
    return 0
