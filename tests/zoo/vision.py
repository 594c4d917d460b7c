"""Models of images."""

from __future__ import annotations

import transformers

from tests.zoo.model import SMALL, image_model


def _vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))


MODELS = (image_model("ViT", _vit),)
