"""What an app's files are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class App:
    """An exported model as an app sees it.

    signature: what signature.json says. arch: the target's. weights_bytes, weights_checksum: of the file of
    weights; the checksum tells it from those of other models and versions.
    """

    signature: Mapping[str, Any]
    arch: str
    weights_bytes: int
    weights_checksum: int

    @property
    def name(self) -> str:
        return self.signature["name"]
