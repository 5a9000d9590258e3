# SPDX-License-Identifier: Apache-2.0
"""Token-by-token oracle: StreamingLLM for MPT, from a checkpoint's own tensors.

Independent of the extension, of vLLM and of Hugging Face's MPT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from tests.oracle_alibi import SlotAttention, log_probabilities


class MptOracle:
    """One stream of an MPT.

    Args:
        weights: the checkpoint, by name.
        config: its ``config.json``.
        sinks: sink tokens ``S``.
        window: window tokens ``R``.
    """

    def __init__(
        self, weights: dict[str, Tensor], config: dict[str, Any], *sinks: int
    ) -> None:
        self.weights, self.config = weights, config
        self.settings = config["attn_config"]
        self.heads = config["n_heads"]
        self.head_size = config["d_model"] // self.heads
        self.kv_heads = {
            "multihead_attention": self.heads,
            "multiquery_attention": 1,
            "grouped_query_attention": self.settings.get("kv_n_heads"),
        }[self.settings.get("attn_type", "multihead_attention")]
        scale = self.settings.get("softmax_scale") or self.head_size**-0.5
        slopes = self._slopes(self.settings.get("alibi_bias_max", 8))
        self.attention = [
            SlotAttention(*sinks, scale, slopes=slopes)
            for _ in range(config["n_layers"])
        ]

    def _slopes(self, bias_max: float) -> Tensor:
        """Of the next power of two of heads; odd places first if that is more."""
        power = 1
        while power < self.heads:
            power *= 2
        slopes = 0.5 ** (torch.arange(1, power + 1) * (bias_max / power))
        if power > self.heads:
            slopes = torch.cat((slopes[1::2], slopes[::2]))
        return slopes[: self.heads]

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Read one token; log-probabilities of the next, ``[vocab_size]``."""
        table = self.weights["transformer.wte.weight"]
        hidden = table[[token]]
        for index, attention in enumerate(self.attention):
            block = f"transformer.blocks.{index}"
            hidden = hidden + self._attend(
                block, attention, self._norm(f"{block}.norm_1", hidden)
            )
            inner = self._linear(
                f"{block}.ffn.up_proj", self._norm(f"{block}.norm_2", hidden)
            )
            hidden = hidden + self._linear(f"{block}.ffn.down_proj", gelu(inner))
        logits = linear(self._norm("transformer.norm_f", hidden), table)
        return log_probabilities(logits * (self.config.get("logit_scale") or 1.0))

    def _attend(self, block: str, attention: SlotAttention, hidden: Tensor) -> Tensor:
        fused = self._linear(f"{block}.attn.Wqkv", hidden)
        clip = self.settings.get("clip_qkv")
        if clip:
            fused = fused.clamp(-clip, clip)
        kv_size = self.kv_heads * self.head_size
        query, key, value = fused.split([self.config["d_model"], kv_size, kv_size], 1)
        if self.settings.get("qk_ln"):
            query = self._norm(f"{block}.attn.q_ln", query)
            key = self._norm(f"{block}.attn.k_ln", key)
        mixed = attention(*(x.view(-1, self.head_size) for x in (query, key, value)))
        return self._linear(f"{block}.attn.out_proj", mixed)

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        return linear(
            rows, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        )

    def _norm(self, name: str, rows: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias")
        return layer_norm(rows, weight.shape, weight, bias, eps=1e-5)
