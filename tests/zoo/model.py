"""What a model of the zoo is, and the inputs that its kind takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
Dynamic = dict[str, dict[int, tuple[str, int, int]]]
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
"""One layer: equal ones would only be traced again."""
DEEPER = {**SMALL, "num_hidden_layers": 2}
"""For models whose layers differ or share something, and for the first of its kind."""
VOCABULARY = 60
BATCH, LENGTH = ("batch", 1, 4), ("length", 1, 24)

KINDS = {
    "torch": "it cannot be captured from torch",
    "onnx": "it cannot be exported to ONNX, or the file not be captured",
    "operations": "the two routes give different operations",
    "sites": "the two routes give different sites",
    "attention": "an attention stays decomposed",
    "norm": "a norm stays decomposed",
    "gelu": "a GELU stays decomposed",
}
"""What may be wrong with a model, as keys of `ZooModel.exceptions`."""


@dataclass(frozen=True)
class ZooModel:
    """One architecture: a small configuration with random weights, and inputs for it.

    Attributes:
        name: as its authors write it.
        family: text, vision, decoders or audio.
        make: builds the module, with the weights that torch's seed gives.
        inputs: ``inputs(**sizes)`` gives tensors by argument name; sizes are those of the named dimensions.
        sizes: assignments of the named dimensions to try; the first one is that of the example.
        dynamic: input name -> axis -> (dimension name, smallest size, largest size).
        exceptions: what does not hold for the model, one of `KINDS`, and why. A reason that no longer applies is a
            mistake, as is one that is missing.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    sizes: tuple[Mapping[str, int], ...]
    dynamic: Dynamic = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.exceptions.keys() <= KINDS.keys(), f"{self.name}: exceptions are among {', '.join(KINDS)}"

    def build(self) -> nn.Module:
        """The module in evaluation mode: no two weights alike, none of them the zeros and ones of fresh layers."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim < 2 else 0.02))
        if hasattr(model, "config"):
            model.config.use_cache = False
        return model.eval()

    def example(self) -> Inputs:
        return self.inputs(**self.sizes[0])


def text_model(name: str, family: str, make: Callable[[], nn.Module], **options: Any) -> ZooModel:
    """A model of token ids and a padding mask."""
    return ZooModel(
        name,
        family,
        make,
        options.pop("inputs", text),
        ({"batch": 2, "length": 12}, {"batch": 3, "length": 21}, {"batch": 1, "length": 5}),
        options.pop("dynamic", {n: {0: BATCH, 1: LENGTH} for n in ("input_ids", "attention_mask")}),
        options,
    )


def image_model(name: str, make: Callable[[], nn.Module], size: int = 32, **exceptions: str) -> ZooModel:
    """A model of square images with ``size`` pixels a side; the batch varies."""
    return ZooModel(
        name,
        "vision",
        make,
        lambda batch: {"pixel_values": torch.randn(batch, 3, size, size, generator=seeded(batch))},
        ({"batch": 2}, {"batch": 3}, {"batch": 1}),
        {"pixel_values": {0: BATCH}},
        exceptions,
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(batch: int, length: int, pad: int = 1, prefix: str = "") -> Inputs:
    """Token ids and their padding mask: each row is three tokens shorter than the one before it, but has one."""
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=seeded(batch * 1000 + length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, max(1, length - 3 * row) :] = 0
    return {f"{prefix}input_ids": torch.where(mask == 1, ids, pad), f"{prefix}attention_mask": mask}
