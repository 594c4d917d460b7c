"""Show what is in an artifact or an exported model, or the program that a model becomes.

tersor inspect minilm.tersor
tersor inspect ./all-MiniLM-L6-v2
tersor inspect model.onnx
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.cli import options as shared
from tersor.cli.output import human, table

if TYPE_CHECKING:
    from tersor.codegen.runtime import FunctionSignature


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="OUT|MODEL",
        help="an artifact, an exported model, a local transformers folder, or an ONNX file",
    )
    shared.add_dynamic(parser)


def execute(options: argparse.Namespace) -> int:
    from tersor.codegen.export.folder import is_exported
    from tersor.codegen.runtime.manifest import MANIFEST

    if is_exported(options.path):
        return exported(options.path)
    if (options.path / MANIFEST).is_file():
        return artifact(options.path)
    return program(options.path, shared.dynamic_of(options, options.path))


def artifact(path: Path) -> int:
    """Signatures, origin, files and what the passes did; also of an artifact that this CPU cannot run."""
    from tersor.codegen.runtime.folder import map_files, read_manifest
    from tersor.codegen.runtime.manifest import REPORT

    manifest = read_manifest(path)
    report = json.loads(bytes(map_files(path, manifest)[REPORT]))
    show(manifest.functions, {name: str(state) for name, state in manifest.states.items()})
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
    if report.get("steps"):
        table(
            ("pass", "result", "places", "parameters", "MACs", "error"),
            map(row, report["steps"]),
            right=("places", "parameters", "MACs", "error"),
        )
    return 0


def exported(path: Path) -> int:
    """Signatures, origin and files of a model exported as C."""
    from tersor.codegen.export.folder import Exported

    found = Exported.read(path)
    show(found.functions, {})
    table(
        ("property", "value"),
        [
            ("target", f"{found.target.name} ({found.target.llvm_triple})"),
            ("recipe", found.recipe),
            ("made by", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
            *((file.name, human(file.stat().st_size)) for file in sorted(path.iterdir()) if file.is_file()),
        ],
    )
    return 0


def show(functions: Mapping[str, FunctionSignature], states: Mapping[str, str]) -> None:
    """Print how functions are called; states: what is said of each, by name."""
    for name, signature in functions.items():
        inputs, outputs = (", ".join(map(str, tensors)) for tensors in (signature.inputs, signature.outputs))
        print(f"{name}({inputs}) -> {outputs}")
        for state in signature.states:
            print(f"  state {states.get(state, state)}")
        for dimension, (low, high) in signature.dims.items():
            print(f"  {dimension} from {low} to {high}")


def row(step: dict[str, Any]) -> tuple[str, ...]:
    """A pass of the report: what it left of the program, and how far it moved the results."""
    error = "" if step["error"] is None else f"{float(step['error']):.1e}"
    left = (f"{step['after'][key]:,}" for key in ("parameters", "macs"))
    return (step["name"], step["status"], str(len(step["changes"]) or ""), *left, error)


def program(path: Path, dynamic: shared.Dynamic | str | None) -> int:
    """The captured program as text, and what it costs."""
    import tersor
    from tersor.ir.costs import cost
    from tersor.ir.text import print_program

    captured = tersor.capture(path, dynamic=dynamic)
    print(f"{print_program(captured)}\n\n{cost(captured)}")
    return 0
