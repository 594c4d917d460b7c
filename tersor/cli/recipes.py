"""List the recipes: named lists of passes for `--recipe`."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def execute(options: argparse.Namespace) -> int:
    from tersor.passes import recipes

    raise SystemExit(dir(recipes))
