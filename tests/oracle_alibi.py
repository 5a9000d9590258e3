# SPDX-License-Identifier: Apache-2.0
"""Token-by-token oracle: StreamingLLM for Falcon and BLOOM, rotary or ALiBi.

Keeps unrotated keys, evicts after every step, and gives every cached key the position
of its slot, anew at each step: a rotation, or ALiBi's bias of ``-slope`` a slot.
Independent of the extension and of vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import BloomForCausalLM, FalconForCausalLM

from tests.oracle import rotate


def geometric_slopes(num_heads: int) -> Tensor:
    """ALiBi slopes, float32 ``[num_heads]`` (Press et al., 2022, section 3).

    ``2^(-8/n), 2^(-16/n), ...`` for a power of two; the heads above one take every
    second slope of the next power of two.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-4 * k / power) for k in range(1, 2 * power, 2)]
    return torch.tensor((slopes + between)[:num_heads], dtype=torch.float32)


class SlotAttention:
    """One layer's cache and attention; positions are slots.

    Args:
        sinks: sink tokens ``S``.
        window: window tokens ``R``.
        scale: factor of the logits.
        theta: base of the rotary frequencies, None without rotary.
        slopes: ALiBi slopes ``[num_heads]``, None without ALiBi.
    """

    def __init__(
        self,
        sinks: int,
        window: int,
        scale: float,
        theta: float | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        self.sinks, self.window, self.scale = sinks, window, scale
        self.theta, self.slopes = theta, slopes
        self.keys = self.values = torch.empty(0)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend and evict.

        Args:
            query: ``[num_heads, head_size]``, as projected.
            key: ``[num_kv_heads, head_size]``, as projected.
            value: ``[num_kv_heads, head_size]``.

        Returns:
            ``[1, num_heads * head_size]``.
        """
        keys, values = key[None], value[None]
        if self.keys.numel():
            keys = torch.cat((self.keys, keys))
            values = torch.cat((self.values, values))
        count = keys.shape[0]
        slots = torch.arange(count)
        query, placed = query[None], keys
        if self.theta is not None:
            query = rotate(query, slots[-1:], self.theta)
            placed = rotate(keys, slots, self.theta)
        group = query.shape[1] // keys.shape[1]
        placed = placed.repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hk", query, placed) * self.scale
        if self.slopes is not None:
            logits = logits - self.slopes[:, None] * (count - 1 - slots)
        weights = logits.softmax(dim=-1)
        mixed = torch.einsum("hk,khd->hd", weights, values.repeat_interleave(group, 1))
        if count > self.sinks + self.window:
            keys, values = (
                torch.cat((rows[: self.sinks], rows[count - self.window :]))
                for rows in (keys, values)
            )
        self.keys, self.values = keys, values
        return mixed.reshape(1, -1)


class FalconOracle:
    """One stream of a Hugging Face Falcon: 7B, new decoder or RW (ALiBi) style."""

    def __init__(self, model: FalconForCausalLM, sinks: int, window: int) -> None:
        self.model, self.config = model, model.config
        config = self.config
        self.heads, self.head_size = config.num_attention_heads, config.head_dim
        if config.new_decoder_architecture:
            self.kv_heads = config.num_kv_heads
        else:
            self.kv_heads = 1 if config.multi_query else self.heads
        scale = self.head_size**-0.5
        if config.alibi:
            # A Falcon adds the bias before it scales the logits. (Hugging Face also
            # rounds slope times position to bfloat16, which vLLM does not.)
            positions = {"slopes": geometric_slopes(self.heads) * scale}
        else:
            positions = {"theta": config.rope_parameters["rope_theta"]}
        self.attention = [
            SlotAttention(sinks, window, scale, **positions)
            for _ in model.transformer.h
        ]

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Read one token; log-probabilities of the next, ``[vocab_size]``."""
        body = self.model.transformer
        hidden = body.word_embeddings(torch.tensor([token]))
        for layer, attention in zip(body.h, self.attention, strict=True):
            hidden = self._layer(layer, attention, hidden)
        return log_probabilities(self.model.lm_head(body.ln_f(hidden)))

    def _layer(
        self, layer: nn.Module, attention: SlotAttention, hidden: Tensor
    ) -> Tensor:
        if self.config.new_decoder_architecture:
            attention_input, mlp_input = layer.ln_attn(hidden), layer.ln_mlp(hidden)
        else:
            attention_input = mlp_input = layer.input_layernorm(hidden)
        # Heads come in groups: the queries of a kv head, its key, its value.
        fused = layer.self_attention.query_key_value(attention_input)
        fused = fused.view(self.kv_heads, -1, self.head_size)
        mixed = attention(
            fused[:, :-2].reshape(-1, self.head_size), fused[:, -2], fused[:, -1]
        )
        attended = layer.self_attention.dense(mixed)
        if self.config.new_decoder_architecture or self.config.parallel_attn:
            return hidden + attended + self._mlp(layer.mlp, mlp_input)
        hidden = hidden + attended
        return hidden + self._mlp(layer.mlp, layer.post_attention_layernorm(hidden))

    @staticmethod
    def _mlp(mlp: nn.Module, rows: Tensor) -> Tensor:
        return mlp.dense_4h_to_h(gelu(mlp.dense_h_to_4h(rows)))


class BloomOracle:
    """One stream of a Hugging Face BLOOM.

    Args:
        model: the model.
        sinks: sink tokens ``S``.
        window: window tokens ``R``.
        approximate: form of the GELU: Hugging Face's BLOOM has "tanh", vLLM's "none".
    """

    def __init__(
        self,
        model: BloomForCausalLM,
        sinks: int,
        window: int,
        approximate: str = "none",
    ) -> None:
        self.model, self.approximate = model, approximate
        self.heads = model.config.n_head
        self.head_size = model.config.hidden_size // self.heads
        slopes = geometric_slopes(self.heads)
        self.attention = [
            SlotAttention(sinks, window, self.head_size**-0.5, slopes=slopes)
            for _ in model.transformer.h
        ]

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Read one token; log-probabilities of the next, ``[vocab_size]``."""
        body = self.model.transformer
        hidden = body.word_embeddings(torch.tensor([token]))
        hidden = body.word_embeddings_layernorm(hidden)
        for layer, attention in zip(body.h, self.attention, strict=True):
            fused = layer.self_attention.query_key_value(layer.input_layernorm(hidden))
            fused = fused.view(self.heads, 3, self.head_size)
            mixed = attention(fused[:, 0], fused[:, 1], fused[:, 2])
            hidden = hidden + layer.self_attention.dense(mixed)
            inner = layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(hidden))
            inner = gelu(inner, approximate=self.approximate)
            hidden = hidden + layer.mlp.dense_4h_to_h(inner)
        return log_probabilities(self.model.lm_head(body.ln_f(hidden)))


def log_probabilities(logits: Tensor) -> Tensor:
    """Of one row of logits, float64 ``[vocab_size]``."""
    return logits[0].double().log_softmax(dim=-1)
