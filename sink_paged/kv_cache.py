# SPDX-License-Identifier: Apache-2.0
"""The block policy inside vLLM: a cache spec and its manager.

``SinkWindowSpec`` says what a layer keeps; ``SinkWindowManager`` pins the sink blocks,
frees window blocks first in, first out, and finds prefix-cache hits that consist of
the pinned blocks and the window. The numbers come from :mod:`sink_paged.window`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    iter_layer_specs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sink_paged.config import StreamConfig
from sink_paged.patching import find_first
from sink_paged.window import BlockWindow, SinkWindow, cdiv


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """KV cache of a layer that keeps ``S`` sink tokens and ``R`` recent ones.

    A ``SlidingWindowSpec`` because vLLM caps admission and sizes the pool by a bounded
    number only for those. ``sliding_window`` is ``R + 1``: it counts the query itself.

    Attributes:
        sink_tokens: ``S``.
        lookahead_tokens: slots behind the tokens in flight, which a draft model fills.
    """

    sink_tokens: int
    lookahead_tokens: int = 0

    @classmethod
    def from_attention(
        cls, spec: AttentionSpec, window: SinkWindow, lookahead_tokens: int = 0
    ) -> Self:
        """The same cache layout as ``spec``, kept by the policy ``window``."""
        layout = {
            field.name: getattr(spec, field.name) for field in fields(AttentionSpec)
        }
        return cls(
            **layout,
            sliding_window=window.window_tokens + 1,
            sink_tokens=window.sink_tokens,
            lookahead_tokens=lookahead_tokens,
        )

    @property
    def blocks(self) -> BlockWindow:
        """The block policy of this layer."""
        window = SinkWindow(self.sink_tokens, self.sliding_window - 1)
        return BlockWindow(window, self.block_size)

    @property
    def num_retained_tokens(self) -> int:
        """Zero: no column of a ring is one that vLLM may take for the null block's.

        Since 0.33 its model runner V2 does so for what is behind a sliding window.
        """
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """The most blocks a stream holds, whatever its length."""
        return self.max_blocks(max_in_flight_tokens)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Columns of the worker's ring block table."""
        return self.max_blocks(vllm_config.max_in_flight_tokens)

    def max_blocks(self, tokens_in_flight: int) -> int:
        """The most blocks a stream holds with so many tokens in flight."""
        return self.blocks.max_blocks(tokens_in_flight + self.lookahead_tokens)

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        """Layers share a block table when they keep the same tokens."""
        return all(
            isinstance(spec, SinkWindowSpec) and spec.blocks == self.blocks
            for spec in kv_cache_specs.values()
        )


def group_layers(
    specs: dict[str, KVCacheSpec], vllm_config: VllmConfig
) -> list[KVCacheGroupSpec]:
    """The groups that vLLM makes of layers, by their names."""
    group = find_first(
        "vllm.v1.core.kv_cache_planning:get_kv_cache_groups",  # since 0.33
        "vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
    )
    groups: list[KVCacheGroupSpec] = group(vllm_config, specs)
    return groups


def group_spec(group: KVCacheGroupSpec) -> SinkWindowSpec:
    """The spec of a group's layers, or of one of them: they keep the same tokens."""
    spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
    assert isinstance(spec, SinkWindowSpec)
    return spec


def block_bytes(groups: Sequence[KVCacheGroupSpec]) -> int:
    """Bytes of a KV block on a worker; it has room for the layers of any group."""
    return max(
        group.kv_cache_spec.page_size_bytes  # of all layers where they differ
        if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
        else len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        for group in groups
    )


class StreamBound(NamedTuple):
    """What a stream holds at most, of the blocks of all its layers' groups.

    Attributes:
        blocks: KV blocks with the most tokens in flight.
        decoding_blocks: KV blocks while it only decodes.
        nbytes: bytes of `blocks` on a worker.
    """

    blocks: int
    decoding_blocks: int
    nbytes: int

    @classmethod
    def of(cls, groups: Sequence[KVCacheGroupSpec], vllm_config: VllmConfig) -> Self:
        """The bound of a stream in layers that vLLM has grouped so."""
        specs = [group_spec(group) for group in groups]
        in_flight = vllm_config.max_in_flight_tokens
        decoding = 1 + vllm_config.num_speculative_tokens
        blocks = sum(spec.max_blocks(in_flight) for spec in specs)
        return cls(
            blocks,
            sum(spec.max_blocks(decoding) for spec in specs),
            blocks * block_bytes(groups),
        )

    def check_fits(self, available: int, vllm_config: VllmConfig) -> None:
        """Refuse a KV cache that cannot hold a stream.

        Args:
            available: bytes for the KV cache on a worker.
            vllm_config: of a streaming engine.

        Raises:
            ValueError: naming what to change.
        """
        if self.nbytes <= available:
            return
        stream = StreamConfig.load(vllm_config.additional_config)
        assert stream is not None, "only a streaming engine has this bound"
        raise ValueError(
            f"the KV cache has {available >> 20} MiB, but a stream with cache config "
            f"{stream.window} can hold {self.nbytes >> 20} MiB while "
            f"{vllm_config.max_in_flight_tokens} of its tokens are in flight: give the "
            "KV cache more memory, or lower --sink-window or --max-num-batched-tokens"
        )


class WindowCounts(NamedTuple):
    """What a group's manager counts for the metrics, as ``metrics`` names it."""

    streams_past_window: int
    resident_tokens: int
    blocks_evicted: int
    tokens_evicted: int


class SinkWindowManager(SingleTypeKVCacheManager):
    """Allocates, frees and finds the blocks of streams with sinks and a window.

    What happens at every step to every stream is a few look-ups; all else waits until
    a block expires, or until somebody asks.
    """

    def __init__(
        self,
        kv_cache_spec: SinkWindowSpec,
        max_admission_blocks_per_request: int | None = None,
        **kwargs: Any,
    ) -> None:
        """See ``SingleTypeKVCacheManager``."""
        super().__init__(
            kv_cache_spec,
            max_admission_blocks_per_request=max_admission_blocks_per_request,
            **kwargs,
        )
        self.blocks = kv_cache_spec.blocks
        self.admission_cap = max_admission_blocks_per_request
        self._num_computed: dict[str, int] = {}
        self._next_expiry: dict[str, int] = {}  # computed tokens that a block waits for
        self._blocks_pinned: int | None = None  # to be counted when somebody asks
        self._blocks_evicted = self._tokens_told = 0
        self._tokens_of_others = 0  # evicted by streams that have gone, less by hits

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Free blocks that slots for ``num_tokens`` take, re-used hits included."""
        held = self.req_to_blocks.get(request_id)
        if held:
            if len(held) < self.blocks.pinned_blocks:
                self._blocks_pinned = None  # more are about to be held
            missing = -(-num_tokens // self.block_size) - len(held)
            if missing > 0 and apply_admission_cap and self.admission_cap is not None:
                # A session goes on, whose next piece may be longer than the pool.
                missing = min(missing, self.admission_cap - self._resident(held))
            return missing if missing > 0 else 0
        self._blocks_pinned = None
        needed = self.blocks.resident_blocks(total_computed_tokens, num_tokens)
        if apply_admission_cap and self.admission_cap is not None:
            needed = min(needed, self.admission_cap)
        num_hits = sum(not block.is_null for block in new_computed_blocks)
        evictable: int = self._get_num_evictable_blocks(new_computed_blocks)
        return max(needed - num_hits, 0) + evictable

    def _resident(self, held: Sequence[KVCacheBlock]) -> int:
        """Blocks of a stream that have not been evicted."""
        pinned = min(self.blocks.pinned_blocks, len(held))
        newest = itertools.takewhile(
            lambda block: not block.is_null, reversed(held[pinned:])
        )
        return pinned + sum(1 for _ in newest)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over the blocks of a prefix-cache hit, null blocks where evicted."""
        req_blocks = self.req_to_blocks[request_id]
        assert not req_blocks, "hits are taken once, before any allocation"
        self.block_pool.touch([b for b in new_computed_blocks if not b.is_null])
        req_blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(req_blocks)
        self._num_computed[request_id] = num_local_computed_tokens
        self._tokens_of_others -= self._excess(num_local_computed_tokens)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The pinned blocks and the window before the longest resumable prefix."""
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        assert not drop_eagle_block and dcp_world_size == pcp_world_size == 1
        policy = kv_cache_spec.blocks
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            policy.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        found: dict[int, list[KVCacheBlock]] = {}

        def is_cached(block: int) -> bool:
            cached = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
            if cached:
                found[block] = cached
            return bool(cached)

        hit = policy.longest_hit(
            min(max_length // policy.block_size, len(hashes)),
            is_cached,
            cdiv(alignment_tokens, policy.block_size),
        )
        next_query = hit * policy.block_size
        oldest = policy.first_window_block(next_query)
        missing = [block_pool.null_block] * len(kv_cache_group_ids)
        rows = [
            found[block] if block < policy.pinned_blocks or block >= oldest else missing
            for block in range(hit)
        ]
        groups = range(len(kv_cache_group_ids))
        return tuple([row[group] for row in rows] for group in groups), next_query

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free, oldest first, the blocks that no query from now on attends.

        Args:
            request_id: the stream.
            processed_computed_tokens: text position of the oldest query that may
                still run.
            num_prompt_tokens: ignored, prompt and output are one text.
        """
        if processed_computed_tokens < self._next_expiry.get(request_id, 0):
            self._num_computed[request_id] = processed_computed_tokens
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        self._num_computed[request_id] = processed_computed_tokens
        first = self.blocks.first_window_block(processed_computed_tokens)
        self._next_expiry[request_id] = self.blocks.expiry(first)
        expired = []
        for index in range(
            min(first, len(blocks)) - 1, self.blocks.pinned_blocks - 1, -1
        ):
            if blocks[index].is_null:
                break
            expired.append(blocks[index])
            blocks[index] = self._null_block
        if expired:
            self.block_pool.free_blocks(reversed(expired))
            self._blocks_evicted += len(expired)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a stream that has finished, or is preempted; its blocks."""
        self._blocks_pinned = None
        num_computed = self._num_computed.pop(request_id, 0)
        self._tokens_of_others += self._excess(num_computed)
        self._next_expiry.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @property
    def blocks_pinned(self) -> int:
        """Blocks that hold sinks of running streams; a shared one counts once."""
        if self._blocks_pinned is None:
            pinned = self.blocks.pinned_blocks
            rows = self.req_to_blocks.values()
            held = {block.block_id for row in rows for block in row[:pinned]}
            self._blocks_pinned = len(held)
        return self._blocks_pinned

    def take_counts(self) -> WindowCounts:
        """Counts of all streams; what was evicted is counted anew from here."""
        capacity = self.blocks.window.capacity
        past = total = resident = 0
        for num_computed in self._num_computed.values():
            total += num_computed
            if num_computed > capacity:
                past += 1
                num_computed = capacity
            resident += num_computed
        evicted = max(self._tokens_told, self._tokens_of_others + total - resident)
        counts = WindowCounts(
            past, resident, self._blocks_evicted, evicted - self._tokens_told
        )
        self._blocks_evicted, self._tokens_told = 0, evicted
        return counts

    def _excess(self, num_computed: int) -> int:
        """Tokens of a stream that it attends no longer."""
        excess = num_computed - self.blocks.window.capacity
        return excess if excess > 0 else 0

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens before the window; the sinks among them stay resident."""
        return max(0, num_computed_tokens - self.blocks.window.window_tokens)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No cascade attention (asked for up to vLLM 0.31)."""
        return 0


def register() -> None:
    """Enter the spec and its manager into vLLM's registry."""
    # vLLM fills its registry on first use and only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec
    )
