# SPDX-License-Identifier: Apache-2.0
"""Sink attention on CUDA, as vLLM calls it.

Stands in for ``vllm/v1/attention/backends/triton_attn.py``, with the same cache and the
same kernel that writes into it.

What a launch looks like depends on the shapes and integers of the metadata alone, so a
batch of any kind can be captured in a CUDA graph: vLLM captures with the most requests
and the longest query that a graph will serve, and the tensors are its own, which stay
where they are. A padded request has no rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
    triton_reshape_and_cache_flash,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from sink_paged.attention import flash
from sink_paged.attention.backend import (
    SinkAttentionBackend,
    SinkAttentionImpl,
    SinkAttentionMetadata,
    SinkAttentionMetadataBuilder,
)
from sink_paged.attention.triton import Workspace, sink_attention
from sink_paged.rotary import UnsupportedLayerError

MAX_HEAD_SIZE = 256


@dataclass
class SinkTritonMetadata(SinkAttentionMetadata):
    """One step's batch, and what the kernel's launch depends on.

    Attributes:
        max_query_len: no request has more tokens in the step.
        workspace: for the partial results of decodes, of one layer at a time.
        unrolled: where FlashAttention finds the window's keys; None for decodes, and
            where it is not used.
    """

    max_query_len: int
    workspace: Workspace
    unrolled: flash.WindowTable | None


class SinkTritonMetadataBuilder(SinkAttentionMetadataBuilder):
    """Passes the batch on, with memory that was allocated once."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        """See ``AttentionMetadataBuilder``."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        num_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        if num_heads is None:
            num_heads = vllm_config.model_config.get_num_attention_heads(
                vllm_config.parallel_config
            )
        self.workspace = Workspace(
            num_heads,
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            device,
            # A verification is a decode of several tokens. (The draft model's own first
            # pass may have one more, and then does not split its keys.)
            max_query_len=1 + vllm_config.num_speculative_tokens,
        )
        self.window = kv_cache_spec.blocks.window
        self.block_size = kv_cache_spec.block_size
        compilation = vllm_config.compilation_config
        layers = [compilation.static_forward_context[name].impl for name in layer_names]
        self.uses_flash = (
            flash.is_available()
            and flash.suits(
                kv_cache_spec.head_size,
                vllm_config.model_config.dtype,
                kv_cache_spec.dtype,
            )
            and all(x.alibi_slopes is None and x.sinks is None for x in layers)
            # Not worth making tables that hardly any step reads, see below.
            and compilation.cudagraph_mode.mixed_mode() != CUDAGraphMode.FULL
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkTritonMetadata:
        """Metadata of a step."""
        batch = super().build(common_prefix_len, common_attn_metadata, fast_build)
        shared = {field.name: getattr(batch, field.name) for field in fields(batch)}
        max_query_len = common_attn_metadata.max_query_len
        unrolled = None
        if self.uses_flash and max_query_len > self.workspace.max_query_len:
            unrolled = flash.window_table(
                batch.query_start_loc,
                batch.seq_lens,
                batch.block_table,
                window=self.window,
                block_size=self.block_size,
                max_query_len=max_query_len,
            )
        return SinkTritonMetadata(
            **shared,
            max_query_len=max_query_len,
            workspace=self.workspace,
            unrolled=unrolled,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SinkTritonMetadata:
        """Metadata for a graph, which would replay its window table for ever."""
        captured = super().build_for_cudagraph_capture(common_attn_metadata)
        return replace(captured, unrolled=None)


class SinkTritonAttentionImpl(SinkAttentionImpl):
    """Attention of one layer by the Triton kernel."""

    def check_supported(self) -> None:
        """See ``SinkAttentionImpl``; the GPU must have the memory and the types."""
        super().check_supported()
        if not current_platform.has_device_capability(80):
            raise UnsupportedLayerError(
                "the attention kernel needs a GPU of compute capability 8.0"
            )
        if self.kv_cache_dtype.startswith("fp8") and not (
            current_platform.has_device_capability(89)
        ):
            raise UnsupportedLayerError(
                f"its KV cache is stored as {self.kv_cache_dtype}, which needs a GPU "
                "of compute capability 8.9"
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SinkTritonMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; ``key`` and ``value`` are in the cache already.

        Args:
            layer: the calling layer, whose ``_k_scale`` and ``_v_scale`` are the
                factors of an 8-bit cache, float32 scalars on the device.
            query: ``[num_tokens, num_heads, head_size]``, rotated at text positions.
            key: unused.
            value: unused.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, uint8
                for an 8-bit cache.
            attn_metadata: the batch; None while vLLM profiles.
            output: ``[num_tokens, num_heads, head_size]``, written in place.
            output_scale: unsupported.
            output_block_scale: unsupported.
        """
        if attn_metadata is None:
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sink_paged does not quantise its output")
        scales = (None, None)
        if self.kv_cache_dtype.startswith("fp8"):
            # The kernel that writes stores every 8-bit dtype as this one.
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
            scales = (layer._k_scale, layer._v_scale)
        rotations = self.rotations
        tensors = (
            query,
            kv_cache,
            output,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            None if rotations is None else rotations.sink_rotation,
        )
        options: dict[str, Any] = {
            "window": self.window,
            "scale": self.scale,
            "interleaved": rotations is not None and rotations.geometry.interleaved,
            "soft_cap": self.soft_cap,
            "max_query_len": attn_metadata.max_query_len,
        }
        unrolled = attn_metadata.unrolled
        if unrolled is not None:
            flash.sink_attention(*tensors, unrolled=unrolled, **options)
            return output
        sink_attention(
            *tensors,
            alibi_slopes=self.alibi_slopes,
            sink_logits=self.sink_logits,
            k_scale=scales[0],
            v_scale=scales[1],
            workspace=attn_metadata.workspace,
            **options,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write the step's keys, values: ``[num_tokens, num_kv_heads, head_size]``."""
        keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        triton_reshape_and_cache_flash(
            key,
            value,
            keys,
            values,
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )


class SinkTritonAttentionBackend(SinkAttentionBackend):
    """The Triton kernel's backend."""

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 8 dims."""
        return head_size % 8 == 0 and head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """A layer's own sliding window."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any order; with a head's slots side by side a program reads whole pages."""
        return (
            KVCacheLayout.LBHNC,
            KVCacheLayout.LBNHC,
            KVCacheLayout.BLHNC,
            KVCacheLayout.BLNHC,
        )

    @staticmethod
    def get_impl_cls() -> type[SinkTritonAttentionImpl]:
        """The layer implementation."""
        return SinkTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SinkTritonMetadataBuilder]:
        """The metadata builder."""
        return SinkTritonMetadataBuilder
