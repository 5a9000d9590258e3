# SPDX-License-Identifier: Apache-2.0
"""Token-by-token oracle: StreamingLLM as the paper describes it, for a Llama.

Keeps unrotated keys, evicts after every step, and gives every cached key the position
of its slot, anew at each step. Independent of the extension and of vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def rotate(rows: Tensor, positions: Tensor, theta: float) -> Tensor:
    """NeoX rotary embedding of ``[tokens, heads, head_size]`` at ``positions``."""
    size = rows.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).double() / size)
    angles = positions.double()[:, None] * frequencies
    cos, sin = (f(angles).to(rows.dtype)[:, None, :] for f in (torch.cos, torch.sin))
    first, second = rows.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class StreamingOracle:
    """One stream of a Hugging Face Llama with cache config ``S+R``."""

    def __init__(
        self, model: LlamaForCausalLM, sink_tokens: int, window_tokens: int
    ) -> None:
        """Start an empty stream."""
        self.model = model
        config = model.config
        self.sinks, self.window = sink_tokens, window_tokens
        self.theta = config.rope_parameters["rope_theta"]
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.head_size = config.head_dim
        self.cache: list[tuple[Tensor, Tensor]] = [
            (torch.empty(0), torch.empty(0)) for _ in model.model.layers
        ]

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Read one token; log-probabilities of the next, ``[vocab_size]``."""
        hidden = self.model.model.embed_tokens(torch.tensor([token]))
        for index, layer in enumerate(self.model.model.layers):
            hidden = hidden + self._attend(index, layer, layer.input_layernorm(hidden))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = self.model.lm_head(self.model.model.norm(hidden))[0]
        return logits.double().log_softmax(dim=-1)

    def _attend(self, index: int, layer: torch.nn.Module, hidden: Tensor) -> Tensor:
        attention = layer.self_attn
        query, key, value = (
            projection(hidden).view(1, -1, self.head_size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = self.cache[index]
        if keys.numel():
            key, value = torch.cat((keys, key)), torch.cat((values, value))
        slots = torch.arange(key.shape[0])
        rotated = rotate(key, slots, self.theta).repeat_interleave(self.groups, 1)
        query = rotate(query, slots[-1:], self.theta)
        logits = torch.einsum("qhd,khd->hqk", query, rotated) / self.head_size**0.5
        weights = logits.softmax(dim=-1)
        mixed = torch.einsum(
            "hqk,khd->qhd", weights, value.repeat_interleave(self.groups, 1)
        )
        if key.shape[0] > self.sinks + self.window:
            recent = key.shape[0] - self.window
            key = torch.cat((key[: self.sinks], key[recent:]))
            value = torch.cat((value[: self.sinks], value[recent:]))
        self.cache[index] = (key, value)
        return attention.o_proj(mixed.reshape(1, -1))


def stream_losses(oracle: StreamingOracle, ids: list[int]) -> list[float]:
    """Negative log-likelihood of ``ids[t + 1]`` after reading ``ids[:t + 1]``."""
    return [
        -float(oracle.step(token)[target])
        for token, target in zip(ids, ids[1:], strict=False)
    ]


def stream_greedy(
    oracle: StreamingOracle, prompt: list[int], count: int
) -> tuple[list[int], list[float]]:
    """Greedy continuation and the gap between the two best tokens at each step."""
    for token in prompt:
        scores = oracle.step(token)
    tokens, gaps = [], []
    for _ in range(count):
        best = scores.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        scores = oracle.step(tokens[-1])
    return tokens, gaps


def greedy_deficit(
    oracle: StreamingOracle, prompt: list[int], tokens: list[int]
) -> float:
    """How far the chosen tokens fall short of the best, at most, in log-probability.

    The oracle reads ``tokens`` as they were chosen, so that every one of them is
    judged, those behind a near tie too.
    """
    for token in prompt:
        scores = oracle.step(token)
    worst = 0.0
    for token in tokens:
        worst = max(worst, float(scores.max() - scores[token]))
        scores = oracle.step(token)
    return worst
