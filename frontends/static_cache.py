"""Decoders of transformers with their keys and values kept in buffers, which capture makes states of the program.

model = WithStaticCache(LlamaForCausalLM.from_pretrained(...), room=512)
program = tersor.capture(model, {"input_ids": prompt, "position": torch.tensor(0)}, lengths, name="prefill")
tersor.capture(model, {"input_ids": token, "position": torch.tensor(0)}, name="decode", into=program)
"""

from __future__ import annotations

import torch
from torch import nn

from tersor.errors import InputError


class WithStaticCache(nn.Module):
    """A causal language model of transformers over a cache of fixed size.

    ``forward(input_ids, position)``: token ids [batch, length], whose first one stands at ``position`` (int64, scalar);
    those before it are what earlier calls wrote. Gives the model's ``logits`` (or ``last_hidden_state``).

    Args:
        model: its configuration is left as it is.
        room: positions that the cache holds.
        batch: sequences side by side.

    Raises:
        InputError: the model takes no static cache, or some of its layers see fewer positions than ``room``.
    """

    def __init__(self, model: nn.Module, room: int, batch: int = 1):
        super().__init__()
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        self.model = model
        try:
            self._cache = StaticCache(config=model.config, max_cache_len=room)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"a {type(model).__name__} cannot be given a cache of fixed size",
                why=f"{type(error).__name__}: {error}",
                fix="give a causal language model of transformers",
            ) from error
        for index, layer in enumerate(self._cache.layers):
            if layer.max_cache_len < room:  # a window, in which old positions give way to new ones
                raise InputError(
                    f"layer {index} of the model sees {layer.max_cache_len} positions, the cache is to hold {room}",
                    why="a cache of fixed size does not slide",
                    fix=f"give room={layer.max_cache_len} at most",
                )
            self._cache.layers[index] = StaticLayer(room)
        with torch.no_grad():  # the layers take their shapes from the first keys and values they see
            self._run(torch.zeros(batch, 1, dtype=torch.int64))
        for index, layer in enumerate(self._cache.layers):
            self.register_buffer(f"keys_{index}", layer.keys.zero_(), persistent=False)
            self.register_buffer(f"values_{index}", layer.values.zero_(), persistent=False)

    def forward(self, input_ids: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        for index, layer in enumerate(self._cache.layers):
            # what torch.export traces are the buffers, not what the cache was made with
            layer.keys, layer.values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
            layer.cumulative_length = position.clone()  # the layer counts in place
        return self._run(input_ids)

    def _run(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        results = self.model(input_ids=input_ids, past_key_values=self._cache, use_cache=True)
        name = "logits" if hasattr(results, "logits") else "last_hidden_state"
        return {name: results[name]}
