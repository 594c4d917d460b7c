"""List the targets, or show one of them.

tersor targets
tersor targets native
"""

from __future__ import annotations

import argparse

from tersor.cli.output import table
from tersor.errors import TargetError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this target in full, or a .toml file")


def execute(options: argparse.Namespace) -> int:
    from tersor import targets

    if options.name:
        print(targets.describe(targets.resolve(options.name)))
        return 0
    table(("target", "CPU", "vectors", "features", "runs here"), [row(name) for name in targets.names()])
    return 0


def row(name: str) -> tuple[str, ...]:
    """A target on one line; one that cannot be described here says why."""
    from tersor import targets

    try:
        target = targets.resolve(name)
    except TargetError as error:
        return name, error.why or error.what, "", "", "no"
    missing = targets.missing_on_host(target)
    runs = f"no: {', '.join(missing)} missing" if missing else "yes"
    return (
        name,
        target.mcpu or target.arch,
        f"{target.vector_bits} bits",
        " ".join(sorted(target.features)),
        runs,
    )
