"""Models of images, and the text towers that come with some of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.zoo.model import SMALL, VOCABULARY, ZooModel, image_model, text_model


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021), which transformers does not have."""

    def __init__(self, patches: int = 16, width: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(_MixerBlock(patches, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class _MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int):
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
        self.channels = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.channel_norm(x))


PATCHES = {"image_size": 32, "patch_size": 8, **SMALL}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 24, **SMALL}
# With torch's own attention the exporter fails on a reshape of its result, before it writes anything.
EAGER = {"attn_implementation": "eager"}


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**PATCHES))


def _deit() -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**PATCHES))


def _swin() -> nn.Module:
    """Windows of 4 x 4 patches, shifted in every second layer; patches are merged between the stages."""
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=4, **EAGER
    )
    return transformers.SwinModel(config)


def _beit() -> nn.Module:
    config = transformers.BeitConfig(use_relative_position_bias=True, vocab_size=64, **PATCHES, **EAGER)
    return transformers.BeitForImageClassification(config)


def _dinov2() -> nn.Module:
    """Trained with images of 56 pixels, used with 32: the position embedding is interpolated."""
    config = transformers.Dinov2Config(
        image_size=56, patch_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.Dinov2Model(config)


def _clip_text() -> nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(bos_token_id=0, eos_token_id=3, **TEXT))


def _clip_vision() -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PATCHES))


def _siglip_text() -> nn.Module:
    return transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT))


def _siglip_vision() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PATCHES))


def _detr() -> nn.Module:
    """On a small ResNet; the first layer of the decoder reads zeros, the second what it made of them."""
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="bottleneck", out_features=["stage2"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, num_queries=7, num_labels=5,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[32, 64], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 4], mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=5,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def _mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 20, 24], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 64], num_labels=5
    )
    model = transformers.MobileViTForImageClassification(config)
    for stage in model.mobilevit.encoder.layer[2:]:
        del stage.transformer.layer[1:]  # 2, 4 and 3 equal layers; the configuration has no say in it
    return model


def _poolformer() -> nn.Module:
    config = transformers.PoolFormerConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_labels=5)
    return transformers.PoolFormerForImageClassification(config)


MODELS: tuple[ZooModel, ...] = (
    image_model("ViT", _vit),
    image_model("DeiT", _deit),
    image_model("Swin", _swin),
    image_model("BEiT", _beit),
    image_model("DINOv2", _dinov2),
    text_model("CLIP text", "vision", _clip_text),
    image_model("CLIP vision", _clip_vision),
    text_model("SigLIP text", "vision", _siglip_text),
    image_model(
        "SigLIP vision",
        _siglip_vision,
        attention="the pooling head attends with one stored query: the scores have heads of their own, "
        "while their product with the values has heads and batch joined",
    ),
    image_model("DETR", _detr, 64),
    image_model("SegFormer", _segformer, 64),
    image_model("MobileViT", _mobilevit, 64),
    image_model("PoolFormer", _poolformer, 64),
    image_model("MLP-Mixer", Mixer),
)
