"""The models that are measured: well-known shapes, random weights (speed does not depend on their values)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SEED = 0
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Model:
    """A transformers architecture with a configuration; a `tersor.peers.Source`.

    `shapes` are the (batch, length) pairs measured by default; a model that takes images of `image` pixels
    squared has no length and uses 0.
    """

    name: str
    architecture: str
    config: tuple[tuple[str, object], ...]
    shapes: tuple[tuple[int, int], ...]
    mask: bool = False
    image: int | None = None
    artifact: Path | None = None

    @property
    def content(self) -> str:
        return repr((self.architecture, self.config, self.mask, SEED))

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        if self.image:
            return {"pixel_values": {0: "batch"}}
        names = ["input_ids", "attention_mask"] if self.mask else ["input_ids"]
        return {name: {0: "batch", 1: "length"} for name in names}

    def build(self) -> torch.nn.Module:
        """The model in evaluation mode, with the same random weights in every process."""
        import torch
        import transformers

        torch.manual_seed(SEED)
        architecture = getattr(transformers, self.architecture)
        return architecture(architecture.config_class(**dict(self.config))).eval()

    def inputs(self, batch: int, length: int, seed: int = SEED) -> dict[str, np.ndarray]:
        """Inputs by name: token ids (int64), with a full mask where the model takes one, or pixels (f32)."""
        random = np.random.default_rng(seed)
        if self.image:
            shape = (batch, 3, self.image, self.image)
            return {"pixel_values": random.standard_normal(shape, dtype=np.float32)}
        inputs = {"input_ids": random.integers(0, dict(self.config)["vocab_size"], (batch, length))}
        if self.mask:
            inputs["attention_mask"] = np.ones((batch, length), dtype=np.int64)
        return inputs

    def calibration(self, inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Other random batches of the same shapes, to quantize with."""
        batch, length = next(iter(inputs.values())).shape[:2]
        return [self.inputs(batch, length, SEED + 1 + i) for i in range(CALIBRATION_BATCHES)]

    def label(self, batch: int, length: int) -> str:
        """`1x128` for tokens, `1x3x224x224` for images."""
        return f"{batch}x3x{self.image}x{self.image}" if self.image else f"{batch}x{length}"


def _config(**values: object) -> tuple[tuple[str, object], ...]:
    return tuple(values.items())


_ALL = (
    Model(
        name="minilm-l6",
        architecture="BertModel",
        config=_config(
            vocab_size=30522,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        ),
        shapes=((1, 8), (1, 16), (1, 128), (8, 128), (1, 512)),
        mask=True,
    ),
    Model(
        name="bert-base",
        architecture="BertModel",
        config=_config(vocab_size=30522),
        shapes=((1, 16), (1, 128), (1, 384), (8, 128)),
        mask=True,
    ),
    Model(
        name="vit-b16",
        architecture="ViTModel",
        config=_config(image_size=224, patch_size=16),
        shapes=((1, 0),),
        image=224,
    ),
    Model(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        config=_config(vocab_size=50257, use_cache=False),
        shapes=((1, 128),),
    ),
    # The shape of SmolLM2-135M.
    Model(
        name="llama-135m",
        architecture="LlamaForCausalLM",
        config=_config(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            use_cache=False,
        ),
        shapes=((1, 128),),
    ),
)
MODELS = {model.name: model for model in _ALL}
"""Measured models by name."""
