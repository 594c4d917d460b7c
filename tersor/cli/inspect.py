"""Show what is in an artifact, or the program that a model folder becomes.

tersor inspect minilm.tersor
tersor inspect ./all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tersor.cli import options as shared
from tersor.cli.output import human, table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="OUT|FOLDER", help="an artifact, or a local transformers folder"
    )
    shared.add_dynamic(parser)


def execute(options: argparse.Namespace) -> int:
    from tersor.codegen.runtime.manifest import MANIFEST

    if (options.path / MANIFEST).is_file():
        return artifact(options.path)
    return program(options.path, shared.dynamic(options.dynamic, options.static))


def artifact(path: Path) -> int:
    """Signatures, origin and files, from the manifest alone."""
    from tersor.codegen.runtime.folder import read_manifest

    manifest = read_manifest(path)
    for name, signature in manifest.functions.items():
        inputs, outputs = (", ".join(map(str, tensors)) for tensors in (signature.inputs, signature.outputs))
        print(f"{name}({inputs}) -> {outputs}")
        for dimension, (low, high) in signature.dims.items():
            print(f"  {dimension} from {low} to {high}")
    table(
        ("property", "value"),
        [
            ("target", f"{manifest.target['name']} ({manifest.target.get('mcpu', manifest.target['arch'])})"),
            ("recipe", manifest.recipe),
            ("compared with the model", "yes" if manifest.verified else "no"),
            ("threads", manifest.threads or "one per core"),
            ("made by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
            *((file, human(record.size)) for file, record in manifest.files.items()),
        ],
    )
    return 0


def program(path: Path, dynamic: shared.Dynamic | str | None) -> int:
    """The captured program as text, and what it costs."""
    import tersor
    from tersor.ir.costs import cost
    from tersor.ir.text import print_program

    captured = tersor.capture(path, dynamic=dynamic)
    print(f"{print_program(captured)}\n\n{cost(captured)}")
    return 0
