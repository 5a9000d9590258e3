# SPDX-License-Identifier: Apache-2.0
"""Sink attention on the CPU, as vLLM calls it.

Stands in for ``vllm/v1/attention/backends/cpu_attn.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from sink_paged.attention.backend import (
    SinkAttentionBackend,
    SinkAttentionImpl,
    SinkAttentionMetadata,
    SinkAttentionMetadataBuilder,
)
from sink_paged.attention.cpu import prepare
from sink_paged.attention.layer import CacheWriter, LayerAttention, Step


@dataclass
class SinkCPUAttentionMetadata(SinkAttentionMetadata):
    """One step's batch.

    Attributes:
        step: the batch as the kernel takes it.
    """

    step: Step


class SinkCPUAttentionMetadataBuilder(SinkAttentionMetadataBuilder):
    """Prepares once a step what the layers share."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkCPUAttentionMetadata:
        """Metadata of a step."""
        batch = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step = Step.of(batch.query_start_loc, batch.seq_lens, batch.block_table)
        return SinkCPUAttentionMetadata(**vars(batch), step=step)


class SinkCPUAttentionImpl(SinkAttentionImpl):
    """Attention of one layer by the CPU kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See ``SinkAttentionImpl``; compiles the kernel or loads it."""
        super().__init__(*args, **kwargs)
        prepare(get_current_vllm_config().model_config.dtype)
        self._writer = CacheWriter()
        self._attention: LayerAttention | None = None

    def _prepare_attention(self) -> LayerAttention:
        """The kernel's view of this layer, once the model is loaded."""
        rotations = self.rotations
        return LayerAttention(
            self.num_heads,
            window=self.window,
            scale=self.scale,
            interleaved=rotations is not None and rotations.geometry.interleaved,
            alibi_slopes=self.alibi_slopes,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write keys and values to the cache, then attend.

        Args:
            layer: the calling layer.
            query: ``[num_tokens, num_heads, head_size]``, rotated at text positions.
            key: ``[num_tokens, num_kv_heads, head_size]``, rotated likewise.
            value: ``[num_tokens, num_kv_heads, head_size]``.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
            attn_metadata: a ``SinkCPUAttentionMetadata``; None while vLLM profiles.
            output: ``[num_tokens, num_heads, head_size]``, written in place.
            output_scale: unsupported.
            output_block_scale: unsupported.
        """
        if attn_metadata is None:
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sink_paged does not quantise its output")
        if self._attention is None:
            self._attention = self._prepare_attention()
        rotations = self.rotations
        self._writer.write(key, value, kv_cache, attn_metadata.slot_mapping)
        self._attention.attend(
            query,
            kv_cache,
            output,
            attn_metadata.step,
            None if rotations is None else rotations.sink_rotation,
        )
        return output


class SinkCPUAttentionBackend(SinkAttentionBackend):
    """The CPU kernel's backend; one dispatch a layer writes the cache and attends."""

    forward_includes_kv_cache_update: bool = True

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
    def get_builder_cls() -> type[SinkCPUAttentionMetadataBuilder]:
        """The metadata builder."""
        return SinkCPUAttentionMetadataBuilder
