# SPDX-License-Identifier: Apache-2.0
"""The face that vLLM sees: an attention backend with sinks and a window.

What the platforms share. :mod:`sink_paged.attention.cpu_backend` and
:mod:`sink_paged.attention.triton_backend` add a kernel each. Keys arrive rotated at
their text positions and are never touched again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from sink_paged.config import StreamConfig
from sink_paged.platforms import KV_CACHE_DTYPES
from sink_paged.rotary import StepRotations, UnsupportedLayerError
from sink_paged.window import layer_window


@dataclass
class SinkAttentionMetadata:
    """One step's batch, shared by all layers.

    Attributes:
        num_actual_tokens: tokens without padding.
        query_start_loc: int32 ``[num_reqs + 1]``.
        seq_lens: int32 ``[num_reqs]``, text length including this step's tokens.
        block_table: int32 ``[num_reqs, num_columns]``, a ring.
        slot_mapping: int64 ``[num_tokens]``.
    """

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class SinkAttentionMetadataBuilder(AttentionMetadataBuilder[SinkAttentionMetadata]):
    """Passes the batch on; nothing here depends on the length of a text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Abstract in ``AttentionMetadataBuilder``, whose own body is all it takes."""
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkAttentionMetadata:
        """Metadata of a step."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("sink_paged attends causally only")
        return SinkAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )


class SinkAttentionImpl(AttentionImpl[SinkAttentionMetadata]):
    """Attention of one layer; subclasses add ``forward`` and ``do_kv_cache_update``.

    Attributes:
        window: what this layer keeps: the cache config, or its own sliding window.
        alibi_slopes: float32 ``[num_heads]``; None for a layer without ALiBi.
        sink_logits: learned sink logits, float32 ``[num_heads]``, or None.
        rotations: rotations of the step's tokens, set once the model is loaded; None
            for a layer without rotary positions.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """See ``AttentionImpl``; ``sinks`` are learned sink logits (gpt-oss)."""
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sliding_window = sliding_window
        self.alibi_slopes = (
            None
            if alibi_slopes is None
            else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.sink_logits: Tensor | None = None
        vllm_config = get_current_vllm_config()
        stream = StreamConfig.load(vllm_config.additional_config)
        assert stream is not None, "this backend is chosen by sink eviction only"
        self.window = layer_window(
            stream.window, sliding_window, vllm_config.cache_config.sliding_window
        )
        self.rotations: StepRotations | None = None

    def check_supported(self) -> None:
        """Refuse what this release does not compute exactly.

        Raises:
            UnsupportedLayerError: with the reason.
        """
        refused = {
            f"it is {self.attn_type} attention, not decoder attention": (
                self.attn_type != AttentionType.DECODER
            ),
            "it reads the KV cache of another layer": (
                self.kv_sharing_target_layer_name is not None
            ),
            f"its KV cache is stored as {self.kv_cache_dtype}": (
                self.kv_cache_dtype not in KV_CACHE_DTYPES
            ),
        }
        for reason, applies in refused.items():
            if applies:
                raise UnsupportedLayerError(reason)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the learned sink logits in the kernel's dtype."""
        if self.sinks is not None:
            self.sink_logits = self.sinks.detach().to(torch.float32).contiguous()


class SinkAttentionBackend(AttentionBackend):
    """Registered as vLLM's ``CUSTOM`` backend and chosen by the sink flag.

    Subclasses name their classes and what their kernel takes.
    """

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = sorted(KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """The name of the enum member under which the backend is registered."""
        return "CUSTOM"

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sink logits (gpt-oss)."""
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: Any = None,
    ) -> list[int | MultipleOf]:
        """Any multiple of 16 tokens."""
        return [MultipleOf(16)]
