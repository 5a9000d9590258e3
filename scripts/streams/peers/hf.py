# SPDX-License-Identifier: Apache-2.0
"""A plain Hugging Face loop of StreamingLLM: a batch of streams, a token a step.

As in the paper, keys are cached before their rotation; at every step the oldest token
behind the sinks gives way, and all cached keys are rotated to the positions of their
slots in the cache. The cache is a ring that is written in place, which spares the
concatenations of a literal loop.

Past the window a token costs the same at any length of the text: the run may stop
``workload.seconds`` after the first tokens. What whole texts would take is then
estimated, in this peer's favour where prompts are shorter than the window.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from streams.memory import peak_bytes, reset_peaks
from streams.report import Report, SkippedError
from streams.result import Recorder, Result
from streams.workload import Workload

WARM_UP_STEPS = 8
LEAST_STEPS = 16


class SinkCache:
    """Which slot the next token takes, and the position in the cache of every slot.

    Holds ``S + R + 1`` slots: the sinks, the window and the query's own token. Behind
    the sinks it is a ring.

    Attributes:
        slots: slots that the tokens of this step take, ``[tokens]``.
        positions: position of the token in each filled slot, ``[filled]``.
        read: tokens read so far.
    """

    def __init__(
        self, sink_tokens: int, window_tokens: int, device: torch.device
    ) -> None:
        """Start empty."""
        self.sinks, self.ring = sink_tokens, window_tokens + 1
        self.capacity = self.sinks + self.ring
        self.device = device
        self.read = 0
        self.slots = self.positions = torch.empty(0, dtype=torch.long, device=device)

    def advance(self, tokens: int) -> None:
        """Make room for the next tokens.

        Raises:
            ValueError: for several tokens unless they are the first and all fit, since
                the earlier ones would attend what the later ones evict.
        """
        if tokens > 1 and (self.read or tokens > self.capacity):
            raise ValueError(f"{tokens} tokens at once after {self.read}")
        filled = min(self.read + tokens, self.capacity)
        self.positions = torch.arange(filled, device=self.device)
        if self.read < self.capacity:
            self.slots = self.positions[self.read :]
        else:
            newest = (self.read - self.sinks) % self.ring
            age = (newest - self.positions[: self.ring]) % self.ring
            self.positions[self.sinks :] = self.capacity - 1 - age
            self.slots = torch.tensor([self.sinks + newest], device=self.device)
        self.read += tokens


class SinkAttention(nn.Module):
    """Stands in for ``LlamaAttention``: its projections, and a ``SinkCache``."""

    def __init__(
        self, attention: Any, rotary: Any, cache: SinkCache, batch: int
    ) -> None:
        """Take over the projections; allocate ``[batch, heads, slots, head_dim]``."""
        super().__init__()
        self.inner, self.cache = attention, cache
        weight = attention.k_proj.weight
        size = attention.head_dim
        kv_heads = weight.shape[0] // size
        shape = (batch, kv_heads, cache.capacity, size)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        everywhere = torch.arange(cache.capacity, device=weight.device)
        cos, sin = rotary(weight, everywhere[None])
        self.cos, self.sin = cos[0], sin[0]

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Attend ``[batch, tokens, hidden]``, whose slots the cache has assigned."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.inner.head_dim))
            for projection in (self.inner.q_proj, self.inner.k_proj, self.inner.v_proj)
        )
        slots, positions = self.cache.slots, self.cache.positions
        self.keys[:, :, slots] = key.transpose(1, 2)
        self.values[:, :, slots] = value.transpose(1, 2)
        filled, tokens = len(positions), len(slots)
        mixed = scaled_dot_product_attention(
            self._rotate(query.transpose(1, 2), positions[slots]),
            self._rotate(self.keys[:, :, :filled], positions),
            self.values[:, :, :filled],
            is_causal=tokens > 1,
            enable_gqa=True,
        )
        return self.inner.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def _rotate(self, rows: Tensor, positions: Tensor) -> Tensor:
        rotated: Tensor = (
            rows * self.cos[positions] + rotate_half(rows) * self.sin[positions]
        )
        return rotated


class SinkLlama:
    """A batch of streams that read a token each at every step."""

    def __init__(
        self, model: LlamaForCausalLM, batch: int, sink_tokens: int, window_tokens: int
    ) -> None:
        """Replace the attention of ``model``."""
        self.model = model
        self.cache = SinkCache(sink_tokens, window_tokens, model.device)
        rotary = model.model.rotary_emb
        for layer in model.model.layers:
            layer.self_attn = SinkAttention(layer.self_attn, rotary, self.cache, batch)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, vocab]`` after ``tokens``, ``[batch, tokens]``."""
        for part in self._parts(tokens):
            self.cache.advance(part.shape[1])
            logits = self.model(part, use_cache=False, logits_to_keep=1).logits
        last: Tensor = logits[:, -1]
        return last

    def _parts(self, tokens: Tensor) -> list[Tensor]:
        """What fits into an empty cache at once; all that follows token by token."""
        first = 1 if self.cache.read else self.cache.capacity
        rest = tokens[:, first:]
        return [tokens[:, :first], *(rest[:, i : i + 1] for i in range(rest.shape[1]))]


def load(workload: Workload) -> SinkLlama:
    """Load the checkpoint.

    Raises:
        SkippedError: when it is no Llama.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, workload.dtype)
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype)
    if not isinstance(model, LlamaForCausalLM):
        reason = f"written for Llama, not for {type(model).__name__}"
        raise SkippedError(reason, everywhere=True)
    recent = workload.window - workload.sink_tokens
    return SinkLlama(
        model.to(device).eval(), workload.streams, workload.sink_tokens, recent
    )


def run(workload: Workload, report: Report) -> Result:
    """Measure one run."""
    begun = time.perf_counter()
    streams = load(workload)
    startup = time.perf_counter() - begun
    device = streams.model.device
    report.phase("warming up")
    tokens = torch.tensor(workload.prompts("warm-up"), device=device)
    for _ in range(WARM_UP_STEPS):
        tokens = streams.read(tokens).argmax(-1, keepdim=True)
    streams.cache.read = 0
    reset_peaks()

    report.phase("writing", workload.streams * workload.output_tokens)
    tokens = torch.tensor(workload.prompts(), device=device)
    recorder = Recorder(workload.streams, workload.prompt_tokens, report.tokens)
    for step in range(workload.output_tokens):
        tokens = streams.read(tokens).argmax(-1, keepdim=True)
        tokens.tolist()  # a client is waiting for them
        moment = time.perf_counter()
        for stream in range(workload.streams):
            recorder.wrote(stream, moment=moment)
        late = 0 < workload.seconds < recorder.writing_seconds
        if late and step >= LEAST_STEPS:
            break
    return recorder.result(
        workload.output_tokens,
        extrapolate=True,
        peak_rss_bytes=peak_bytes(),
        startup_seconds=startup,
    )
