"""Decoders with caches, written by hand in the ways that people write them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, KV_HEADS, SIZE, ROOM, WORDS = 32, 4, 2, 8, 16, 50


class Attention(nn.Module):
    """Grouped queries over a static cache [1, KV_HEADS, ROOM, SIZE]; ``write`` says how it is written."""

    def __init__(self, write: str, attend: str):
        super().__init__()
        self.write, self.attend = write, attend
        self.query = nn.Linear(WIDTH, HEADS * SIZE)
        self.key, self.value = nn.Linear(WIDTH, KV_HEADS * SIZE), nn.Linear(WIDTH, KV_HEADS * SIZE)
        self.output = nn.Linear(HEADS * SIZE, WIDTH)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, KV_HEADS, ROOM, SIZE), persistent=False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in (self.query, self.key, self.value))
        for kept, new in ((self.keys, k), (self.values, v)):
            if self.write == "index_copy":
                kept.index_copy_(2, at, new)
            else:
                kept[:, :, at] = new
        mask = torch.arange(ROOM) <= at[:, None]
        if self.attend == "sdpa":
            out = F.scaled_dot_product_attention(q, self.keys, self.values, mask, enable_gqa=True)
        else:
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (self.keys, self.values))
            scores = q @ k.mT / math.sqrt(SIZE) + torch.where(mask, 0.0, -1e9)
            out = scores.softmax(-1) @ v
        return self.output(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Ids [1, T], the first one at ``position`` -> logits [1, T, WORDS]."""

    def __init__(self, write: str = "index_copy", attend: str = "sdpa", layers: int = 2):
        super().__init__()
        self.embedding, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(ROOM, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.attentions = nn.ModuleList(Attention(write, attend) for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        at = torch.arange(ids.shape[1]) + position
        x = self.embedding(ids) + self.places(at)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), at)
        return self.head(x)

    def clear(self) -> Decoder:
        for buffer in self.buffers():
            buffer.zero_()
        return self
