"""The zoo: small random models of every architecture that Tersor promises to take, each checked from both sides.

    python -m tests.zoo               # the table: every model from torch and from its own ONNX file, compiled
    python -m tests.zoo --only BERT   # one of them
    python -m tests.zoo --write       # writes docs/zoo.md (with --only, those rows)

One file per family holds the models (`text`, `vision`, `decoders`, `audio`); `check` does the checking, `report` the
table and the page.
"""

from __future__ import annotations

from tests.zoo import audio, decoders, text, vision
from tests.zoo.model import ZooModel

ZOO: tuple[ZooModel, ...] = (*text.MODELS, *vision.MODELS, *decoders.MODELS, *audio.MODELS)
