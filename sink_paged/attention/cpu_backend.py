# SPDX-License-Identifier: Apache-2.0
"""Sink attention on the CPU, as vLLM calls it.

Stands in for ``vllm/v1/attention/backends/cpu_attn.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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

FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


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


class _Layer(NamedTuple):
    """A layer's cache in its own dtype, and the kernels prepared for it."""

    cache: Tensor
    writer: CacheWriter
    attention: LayerAttention


class SinkCPUAttentionImpl(SinkAttentionImpl):
    """Attention of one layer by the CPU kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See ``SinkAttentionImpl``; compiles the kernel or loads it."""
        super().__init__(*args, **kwargs)
        prepare(get_current_vllm_config().model_config.dtype)
        self._kv_cache: Tensor | None = None
        self._layer: _Layer

    def _prepare_layer(self, layer: AttentionLayer, kv_cache: Tensor) -> _Layer:
        """The kernels' view of this layer, once the model is loaded."""
        rotations, k_scale, v_scale = self.rotations, 1.0, 1.0
        if self.kv_cache_dtype in FP8_DTYPES:
            kv_cache = kv_cache.view(FP8_DTYPES[self.kv_cache_dtype])
            k_scale, v_scale = layer._k_scale_float, layer._v_scale_float
        attention = LayerAttention(
            self.num_heads,
            window=self.window,
            scale=self.scale,
            interleaved=rotations is not None and rotations.geometry.interleaved,
            alibi_slopes=self.alibi_slopes,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return _Layer(kv_cache, CacheWriter(k_scale, v_scale), attention)

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
            layer: the calling layer, whose ``_k_scale_float`` and ``_v_scale_float``
                are the factors of an 8-bit cache.
            query: ``[num_tokens, num_heads, head_size]``, rotated at text positions.
            key: ``[num_tokens, num_kv_heads, head_size]``, rotated likewise.
            value: ``[num_tokens, num_kv_heads, head_size]``.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, uint8
                for an 8-bit cache.
            attn_metadata: a ``SinkCPUAttentionMetadata``; None while vLLM profiles.
            output: ``[num_tokens, num_heads, head_size]``, written in place.
            output_scale: unsupported.
            output_block_scale: unsupported.
        """
        if attn_metadata is None:
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sink_paged does not quantise its output")
        if kv_cache is not self._kv_cache:
            self._layer = self._prepare_layer(layer, kv_cache)
            self._kv_cache = kv_cache
        cache, writer, attention = self._layer
        rotations = self.rotations
        writer.write(key, value, cache, attn_metadata.slot_mapping)
        attention.attend(
            query,
            cache,
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
