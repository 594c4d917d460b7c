"""The weight file: safetensors, laid out so that every tensor can be used where the kernel maps it.

The format (https://github.com/huggingface/safetensors) is 8 bytes of header length, a JSON header, the data
without holes. Kernels need data aligned to 64 bytes, so the header is padded with spaces and tensors of an
odd size are followed by an entry of padding; any safetensors reader reads the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.errors import ArtifactError

ALIGNMENT = 64
"""Bytes; what TVM's generated code assumes of every buffer."""

PADDING = "__padding__"
"""Prefix of the entries that fill up to the alignment."""

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


def header(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file's first bytes, up to the data; `padding` tells how many zeros follow each tensor."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0

    def entry(tag: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
        nonlocal offset
        offset += size
        return {"dtype": tag, "shape": list(shape), "data_offsets": [offset - size, offset]}

    for name, tensor in tensors.items():
        if name.startswith("__") or tensor.dtype.name not in _TAGS:
            raise ArtifactError(
                f"the weight {name!r} ({tensor.dtype}) cannot be stored",
                fix=f"names must not begin with '__'; dtypes are {', '.join(_TAGS)}",
            )
        entries[name] = entry(_TAGS[tensor.dtype.name], tensor.shape, tensor.nbytes)
        if extra := padding(tensor.nbytes):
            entries[f"{PADDING}{len(entries)}"] = entry("U8", (extra,), extra)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * padding(8 + len(text))
    return len(text).to_bytes(8, "little") + text


def padding(size: int) -> int:
    """Bytes from `size` to the next multiple of the alignment."""
    return -size % ALIGNMENT


def read(data: memoryview, where: str) -> dict[str, np.ndarray]:
    """Views of the tensors in a weight file that lies in memory; ArtifactError when it is malformed."""

    def refuse(why: str) -> ArtifactError:
        return ArtifactError(
            "this artifact's weights cannot be read", where=where, why=why, fix="copy it again"
        )

    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data):
        raise refuse("the header is cut off")
    try:
        entries = json.loads(bytes(data[8 : 8 + length]))
        tensors = {}
        for name, item in entries.items():
            if name.startswith("__"):
                continue
            dtype, shape = np.dtype(DTYPES[item["dtype"]]), tuple(map(int, item["shape"]))
            begin, end = item["data_offsets"]
            count = math.prod(shape)
            start = 8 + length + begin
            if not 0 <= begin <= end <= len(data) - 8 - length or end - begin != count * dtype.itemsize:
                raise refuse(f"the extent of {name!r} does not match its shape or the file")
            if start % ALIGNMENT:
                raise refuse(f"{name!r} does not begin at a multiple of {ALIGNMENT} bytes")
            tensors[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"the header is malformed ({type(error).__name__}: {error})") from error
    return tensors
