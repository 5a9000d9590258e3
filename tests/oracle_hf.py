# SPDX-License-Identifier: Apache-2.0
"""Token-by-token oracle: StreamingLLM for any rotary model of Hugging Face.

The model's own code runs one token at a time. Its rotary modules are neutralised, so
that queries and keys reach the attention function unrotated; there they are cached,
evicted after every step, and rotated anew at each step by the slots in which they
stand, with the model's own rotary module and formula. The softmax (soft cap, learned
sink logits) is the model's own too. Independent of the extension and of vLLM.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "token_by_token"


class StreamingModel:
    """One stream of a Hugging Face causal model with cache config ``S+R``.

    Args:
        model: float32, in evaluation mode. It is taken over: its own forward pass no
            longer rotates.
        sink_tokens: ``S``.
        window_tokens: ``R``.
        keep_native: layers with a sliding window of their own keep that, and no
            sinks; else they too are streamed with ``S+R``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sink_tokens: int,
        window_tokens: int,
        keep_native: bool = True,
    ) -> None:
        """Start an empty stream."""
        self.model = model
        self.sinks, self.window = sink_tokens, window_tokens
        self.keep_native = keep_native
        self.cache: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        model.set_attn_implementation(IMPLEMENTATION)
        for module in model.modules():
            module.token_stream = self
            if "RotaryEmbedding" in type(module).__name__:
                self.rotary = neutralise(module)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Read one token; log-probabilities of the next, ``[vocab_size]``."""
        position = torch.zeros(1, 1, dtype=torch.long)
        output = self.model(
            input_ids=torch.tensor([[token]]), position_ids=position, use_cache=False
        )
        return output.logits[0, -1].double().log_softmax(dim=-1)

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Any
    ) -> tuple[Tensor, Any]:
        """Attention of the newest token: ``[1, heads, 1, head_size]`` each."""
        sinks, window = self.sinks, self.window
        native = options.get("sliding_window")
        if native is not None and self.keep_native:
            sinks, window = 0, native - 1
        if layer in self.cache:
            keys, values = self.cache[layer]
            key, value = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        slots = torch.arange(key.shape[2])
        code = sys.modules[type(layer).__module__]
        output = code.eager_attention_forward(
            layer,
            self.rotate(layer, query, slots[-1:]),
            self.rotate(layer, key, slots),
            value,
            None,
            **options,
        )
        if len(slots) > sinks + window:
            kept = torch.cat((slots[:sinks], slots[len(slots) - window :]))
            key, value = key[:, :, kept], value[:, :, kept]
        self.cache[layer] = (key, value)
        return output

    def rotate(self, layer: nn.Module, rows: Tensor, slots: Tensor) -> Tensor:
        """The model's own rotary embedding of ``rows`` at ``slots``."""
        which = {}
        if "layer_type" in inspect.signature(self.rotary.unneutral).parameters:
            which["layer_type"] = layer.layer_type
        cos, sin = self.rotary.unneutral(rows, slots[None], **which)
        name = f"{layer.layer_type}_inv_freq" if which else "inv_freq"
        rotary_dim = 2 * getattr(self.rotary, name).numel()
        code = sys.modules[type(layer).__module__]
        part = rows[..., :rotary_dim]
        rotated, _ = code.apply_rotary_pos_emb(part, part, cos, sin)
        return torch.cat((rotated, rows[..., rotary_dim:]), dim=-1)


def neutralise(rotary: nn.Module) -> nn.Module:
    """Make a rotary module return no rotation; ``unneutral`` is its own formula."""
    if not hasattr(rotary, "unneutral"):
        rotary.unneutral = rotary.forward

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            cos, sin = rotary.unneutral(*args, **kwargs)
            return torch.ones_like(cos), torch.zeros_like(sin)

        rotary.forward = forward
    return rotary


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    return module.token_stream.attend(module, query, key, value, options)


AttentionInterface.register(IMPLEMENTATION, _attend)
