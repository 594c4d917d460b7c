"""Small random models of each architecture, their inputs, and the comparison with torch."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping

import torch
import transformers
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tersor.frontends.torch_export import flatten_outputs
from tersor.ir import Program, run

logging.getLogger("transformers").setLevel(logging.ERROR)
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BATCH, LENGTH, LONGEST = 3, 12, 60


class PostNorm(nn.Module):
    """A hand-written classifier of tokens around torch's own encoder."""

    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return x if self.batch_first else x.transpose(0, 1)


class SpeltOut(nn.Module):
    """A decoder layer written without any of torch's layers: norms, GELU, rotary, fused QKV, causal mask."""

    def __init__(self, heads: int = 4, width: int = 32):
        super().__init__()
        self.heads, self.width = heads, width
        self.embed = nn.Parameter(torch.randn(50, width) * 0.3)
        self.gain, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width) * 0.1)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width, bias=False)
        angles = torch.outer(
            torch.arange(64.0), 100 ** -(torch.arange(0, width // heads, 2) / (width // heads))
        )
        self.register_buffer("angles", torch.cat((angles, angles), -1))
        self.register_buffer("seen", torch.tril(torch.ones(64, 64, dtype=torch.bool)))

    def rotate(self, x):
        angles = self.angles[: x.shape[2]]
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def forward(self, input_ids, attention_mask):
        x = torch.nn.functional.embedding(input_ids, self.embed)
        batch, length, width = x.shape
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * self.gain + self.shift
        q, k, v = self.qkv(normed).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(~self.seen[:length, :length], float("-inf"))
        scores = scores + (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.scale
        y = self.up(y)
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        return x + self.down(y)


def text(batch: int = BATCH, length: int = LENGTH, vocab: int = 50) -> dict[str, torch.Tensor]:
    """Token ids and a ragged padding mask; every row keeps its first token."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(2, vocab, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _bert(**options):
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZE, **options))


def _roberta(**options):
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=64, **SIZE, **options)
    return transformers.RobertaModel(config)


def _distilbert(**options):
    config = transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=50, **options
    )
    return transformers.DistilBertModel(config)


def _gpt2(**options):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel._from_config(config, **options)


def _llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=50, num_key_value_heads=2, max_position_embeddings=128, **SIZE, **options
    )
    return transformers.LlamaForCausalLM(config)


def _vit(**options):
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SIZE, **options))


def _whisper(**options):
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, max_source_positions=10,
        num_mel_bins=8, **options,
    )  # fmt: skip
    return WhisperEncoder(config)


def _images(batch: int = BATCH) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))}


def _sound(batch: int = BATCH) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 8, 20, generator=torch.Generator().manual_seed(batch))}


TEXT: dict[str, Callable[..., nn.Module]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "post_norm": PostNorm,
    "post_norm_time_first": lambda: PostNorm(batch_first=False),
    "spelt_out": SpeltOut,
}
OTHER: dict[str, tuple[Callable[..., nn.Module], Callable[[int], dict[str, torch.Tensor]]]] = {
    "vit": (_vit, _images),
    "whisper_encoder": (_whisper, _sound),
}


def prepared(model: nn.Module) -> nn.Module:
    """In evaluation mode, with vectors that are not the trivial zeros and ones of fresh layers."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise + (1 if "weight" in name else 0))
    return model.eval()


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps caches out of a decoder's results."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def reference(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch computes, without the fused path of its encoder."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return flatten_outputs(model(**inputs, **no_cache(model)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def error(program: Program, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """Largest difference to torch, relative to each output's scale; the outputs must have the same names."""
    expected, actual = reference(model, inputs), run(program.main, inputs)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
    return max(float((actual[n] - e).abs().max() / e.abs().max()) for n, e in expected.items())


def operations(program: Program) -> Counter[str]:
    return Counter(node.target.name for node in program.main.calls())


def text_dims(longest: int = LONGEST) -> dict[str, dict[int, tuple[str, int, int]]]:
    dims = {0: ("batch", 1, 8), 1: ("length", 1, longest)}
    return {"input_ids": dims, "attention_mask": dims}
