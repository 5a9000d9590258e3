# SPDX-License-Identifier: Apache-2.0
"""Sink attention on the CPU, as vLLM calls it.

Stands in for ``vllm/v1/attention/backends/cpu_attn.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from sink_paged.attention.backend import (
    SinkAttentionBackend,
    SinkAttentionImpl,
    SinkAttentionMetadata,
    SinkAttentionMetadataBuilder,
)
from sink_paged.attention.cpu import prepare, sink_attention, write_kv


class SinkCPUAttentionImpl(SinkAttentionImpl):
    """Attention of one layer by the CPU kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See ``SinkAttentionImpl``; compiles the kernel or loads it."""
        super().__init__(*args, **kwargs)
        prepare(get_current_vllm_config().model_config.dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SinkAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; ``key`` and ``value`` are in the cache already.

        Args:
            layer: the calling layer.
            query: ``[num_tokens, num_heads, head_size]``, rotated at text positions.
            key: unused.
            value: unused.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
            attn_metadata: the batch; None while vLLM profiles.
            output: ``[num_tokens, num_heads, head_size]``, written in place.
            output_scale: unsupported.
            output_block_scale: unsupported.
        """
        if attn_metadata is None:
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sink_paged does not quantise its output")
        rotations = self.rotations
        sink_attention(
            query,
            kv_cache,
            output,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            None if rotations is None else rotations.sink_rotation,
            window=self.window,
            scale=self.scale,
            interleaved=rotations is not None and rotations.geometry.interleaved,
            alibi_slopes=self.alibi_slopes,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write the step's keys, values: ``[num_tokens, num_kv_heads, head_size]``."""
        write_kv(key, value, kv_cache, slot_mapping)


class SinkCPUAttentionBackend(SinkAttentionBackend):
    """The CPU kernel's backend."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """The head sizes of vLLM's own CPU backend."""
        return CPUAttentionBackend.get_supported_head_sizes()

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major blocks, as vLLM's CPU backend."""
        return CPUAttentionBackend.supported_kv_cache_layouts()

    @staticmethod
    def get_impl_cls() -> type[SinkCPUAttentionImpl]:
        """The layer implementation."""
        return SinkCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SinkAttentionMetadataBuilder]:
        """The metadata builder."""
        return SinkAttentionMetadataBuilder
