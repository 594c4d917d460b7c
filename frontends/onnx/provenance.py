"""Where operators of a file come from: read from what exporters of torch write down, and from what we write."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import fx

from tersor.errors import ProgramError
from tersor.ir import Range

_PREFIX = "tersor."
DIMS = f"{_PREFIX}dims"  # of a model: the ranges of its named dimensions, as JSON {name: [smallest, largest]}
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def write_provenance(proto: Any, node: fx.Node) -> None:
    """Notes on a NodeProto the operation that it is part of, its site, module path and source line."""
    told = {"op": node.target.name, **{key: node.meta.get(key) for key in ("site", "module", "source")}}
    for key, value in told.items():
        if value:
            proto.metadata_props.add(key=_PREFIX + key, value=value)


def module_path(name: str, metadata: Mapping[str, str]) -> str:
    """Path of the module that a node came from; "" where its exporter did not write that down.

    torch's dynamo exporter lists the scopes in the node's metadata; its TorchScript exporter, and others, make
    paths of node names: ``/encoder/layer.0/attention/self/query/MatMul``.
    """
    if f"{_PREFIX}op" in metadata:
        return metadata.get(f"{_PREFIX}module", "")
    scopes = metadata.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:
        try:
            path = ast.literal_eval(scopes)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ""
        listed = isinstance(path, list) and len(path) > 1 and isinstance(path[-2], str)
        return path[-2] if listed else ""
    if name.startswith("/"):
        return ".".join(p for p in name.split("/")[1:-1] if p)
    return ""


def source_line(metadata: Mapping[str, str]) -> str:
    """ "file.py:line" of the innermost frame outside torch; "" where the exporter wrote none down."""
    if f"{_PREFIX}source" in metadata:
        return metadata[f"{_PREFIX}source"]
    frames = _FRAME.findall(metadata.get("pkg.torch.onnx.stack_trace", ""))
    own = [(file, line) for file, line in frames if "/torch/" not in file]
    return "" if not own else f"{own[-1][0].rpartition('site-packages/')[2]}:{own[-1][1]}"


def told_site(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(operation, site) of what a node is part of, in files that we wrote."""
    site = metadata.get(f"{_PREFIX}site")
    return (metadata.get(f"{_PREFIX}op", ""), site) if site else None


def told_ranges(metadata: Mapping[str, str]) -> dict[str, Range]:
    """The ranges of named dimensions, in files that we wrote; of what is malformed, nothing is taken."""
    try:
        told = json.loads(metadata.get(DIMS, "{}"))
        return {
            name: Range(low, high) for name, (low, high) in told.items() if type(low) is type(high) is int
        }
    except (ValueError, TypeError, AttributeError, RecursionError, ProgramError):
        return {}
