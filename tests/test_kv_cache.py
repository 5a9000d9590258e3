# SPDX-License-Identifier: Apache-2.0
"""The block policy inside vLLM's own KV-cache manager.

A state machine plays the scheduler: requests arrive, some with a prefix that was read
before, are prefilled in chunks, decode, are preempted and finish. A model of the
physical memory records which text prefix stands in which slot, so that a wrong hit, a
freed or an overwritten block shows as a key with the wrong content.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request

from sink_paged import kv_cache
from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.kv_cache import SinkWindowSpec
from sink_paged.metrics import StreamCounts
from sink_paged.window import BlockWindow, SinkWindow, cdiv

MAX_CHUNK = 24


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    init_none_hash(sha256)
    kv_cache.register()


def make_spec(window: SinkWindow, block_size: int) -> SinkWindowSpec:
    full = FullAttentionSpec(
        block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.float32
    )
    return SinkWindowSpec.from_attention(full, window)


def make_manager(num_blocks: int, caching: bool, *specs: SinkWindowSpec) -> Any:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheManager(
        KVCacheConfig(num_blocks, [], groups),
        max_model_len=MAX_STREAM_TOKENS,
        scheduler_block_size=specs[0].block_size,
        hash_block_size=specs[0].block_size,
        max_in_flight_tokens=MAX_CHUNK,
        enable_caching=caching,
    )


class Scheduler(RuleBasedStateMachine):
    """Drives a ``KVCacheManager`` as vLLM's scheduler does.

    One group of layers that stream, and up to two that slide natively.
    """

    @initialize(
        sinks=st.sampled_from([0, 1, 4, 5, 16, 19]),
        window=st.integers(1, 40),
        block_size=st.sampled_from([1, 4, 16]),
        caching=st.booleans(),
        spare=st.integers(0, 30),
        native=st.lists(st.integers(1, 60), max_size=2),
    )
    def start(
        self,
        sinks: int,
        window: int,
        block_size: int,
        caching: bool,
        spare: int,
        native: list[int],
    ) -> None:
        windows = [SinkWindow(sinks, window), *(SinkWindow(0, w) for w in native)]
        specs = [make_spec(window, block_size) for window in windows]
        self.block_size = block_size
        self.policies = [spec.blocks for spec in specs]
        self.bound = sum(policy.max_blocks(MAX_CHUNK) for policy in self.policies)
        num_blocks = 1 + self.bound + spare  # vLLM keeps one as the null block
        self.manager = make_manager(num_blocks, caching, *specs)
        self.pool = self.manager.block_pool
        self.hasher = get_request_block_hasher(block_size, sha256)
        # Of each slot: which group's layers wrote it, and the text they had read.
        self.memory: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self.texts: list[list[int]] = []
        self.requests: list[Request] = []
        self.count = 0
        self.hits = 0
        # What the metrics should say, from what was seen of each step.
        self.computed: dict[str, int] = {}
        self.blocks_evicted = self.tokens_evicted = 0

    @rule(data=st.data(), length=st.integers(1, 120))
    def arrive(self, data: st.DataObject, length: int) -> None:
        if len(self.requests) == 4:
            return
        prefix: list[int] = []
        if self.texts and data.draw(st.booleans()):
            text = data.draw(st.sampled_from(self.texts))
            prefix = text[: data.draw(st.integers(0, len(text)))]
        new = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        self.count += 1
        request = Request(
            request_id=str(self.count),
            prompt_token_ids=prefix + new,
            sampling_params=SamplingParams(max_tokens=10_000),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.texts.append(prefix + new)
        self.requests.append(request)

    @rule(data=st.data(), chunk=st.integers(1, MAX_CHUNK))
    def step(self, data: st.DataObject, chunk: int) -> None:
        if not self.requests:
            return
        request = data.draw(st.sampled_from(self.requests))
        hit_blocks, num_hit = None, 0
        if request.num_computed_tokens == 0:
            hit_blocks, num_hit, _ = self.manager.get_computed_blocks(request)
            self.hits += num_hit > 0
        if request.num_computed_tokens + num_hit == request.num_tokens:
            request.append_output_token_ids(data.draw(st.integers(0, 1)))
        computed = request.num_computed_tokens + num_hit
        chunk = min(chunk, request.num_tokens - computed)
        free_before = self.pool.get_num_free_blocks()
        held_before = self.held_by(request)
        allocated = self.manager.allocate_slots(
            request,
            chunk,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=hit_blocks,
            full_sequence_must_fit=request.num_computed_tokens == 0,
        )
        evicted = held_before - self.held_by(request)
        self.blocks_evicted += len(evicted)
        self.count_tokens(request.request_id, computed, first=not held_before)
        if allocated is None:
            # One stream alone always fits; so this one waits for the others.
            assert free_before < self.bound
            assert len(self.requests) > 1
            self.preempt(request)
            return
        self.read_and_write(request, computed, chunk)
        request.num_computed_tokens = computed + chunk

    @rule(data=st.data())
    def preempt_one(self, data: st.DataObject) -> None:
        if self.requests:
            self.preempt(data.draw(st.sampled_from(self.requests)))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.requests:
            request = data.draw(st.sampled_from(self.requests))
            self.requests.remove(request)
            self.preempt(request)

    def count_tokens(self, name: str, computed: int, first: bool) -> None:
        capacity = max(policy.window.capacity for policy in self.policies)
        before = computed if first else self.computed[name]
        for text in range(before, computed):
            self.tokens_evicted += text >= capacity
        self.computed[name] = computed

    def held_by(self, request: Request) -> set[tuple[int, int]]:
        """Group and index of each block that is held."""
        return {
            (group, index)
            for group, blocks in enumerate(self.blocks_of(request))
            for index, block in enumerate(blocks)
            if not block.is_null
        }

    def preempt(self, request: Request) -> None:
        self.computed.pop(request.request_id, None)
        self.manager.free(request)
        request.num_computed_tokens = 0

    def blocks_of(self, request: Request) -> list[list[Any]]:
        """The request's blocks in each group."""
        managers = self.manager.coordinator.single_type_managers
        return [
            list(manager.req_to_blocks.get(request.request_id, []))
            for manager in managers
        ]

    def read_and_write(self, request: Request, computed: int, chunk: int) -> None:
        """What the worker does: write the chunk's keys, then attend."""
        groups = self.blocks_of(request)
        for group, (policy, blocks) in enumerate(
            zip(self.policies, groups, strict=True)
        ):
            self.read_and_write_group(group, policy, blocks, request, computed, chunk)
        held = sum(not block.is_null for blocks in groups for block in blocks)
        assert held <= self.bound

    def read_and_write_group(
        self,
        group: int,
        policy: BlockWindow,
        blocks: list[Any],
        request: Request,
        computed: int,
        chunk: int,
    ) -> None:
        text = tuple(request.all_token_ids)
        size, window = self.block_size, policy.window
        for position in range(computed, computed + chunk):
            block = blocks[position // size]
            assert not block.is_null
            assert block.ref_cnt == 1, "written while another stream reads it"
            slot = block.block_id, position % size
            self.memory[slot] = group, text[: position + 1]
        for query in range(computed, computed + chunk):
            for key in (*window.cut_off_sinks(query), *window.recent_keys(query)):
                block = blocks[key // size]
                assert not block.is_null, "an attended key was freed"
                slot = block.block_id, key % size
                assert self.memory[slot] == (group, text[: key + 1])
        held = [index for index, block in enumerate(blocks) if not block.is_null]
        first = policy.first_window_block(computed)
        expected = [
            index
            for index in range(cdiv(computed + chunk, size))
            if index < policy.pinned_blocks or index >= first
        ]
        assert held == expected, "kept: the pinned blocks and the window, nothing else"

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        if not hasattr(self, "pool"):
            return
        held: dict[int, int] = {}
        for request in self.requests:
            for block in itertools.chain.from_iterable(self.blocks_of(request)):
                if not block.is_null:
                    held[block.block_id] = held.get(block.block_id, 0) + 1
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == held.get(block.block_id, 0)
        free = self.pool.num_gpu_blocks - 1 - len(held)
        assert self.pool.get_num_free_blocks() == free

    @invariant()
    def metrics_say_what_happened(self) -> None:
        if not hasattr(self, "pool"):
            return
        counts = StreamCounts.take(self.manager.coordinator.single_type_managers)
        capacity = max(policy.window.capacity for policy in self.policies)
        texts = self.computed.values()
        pinned = {
            block.block_id
            for request in self.requests
            for policy, blocks in zip(
                self.policies, self.blocks_of(request), strict=True
            )
            for block in blocks[: policy.pinned_blocks]
        }
        assert counts == StreamCounts(
            blocks_pinned=len(pinned),
            streams_past_window=sum(text > capacity for text in texts),
            resident_tokens=sum(min(text, capacity) for text in texts),
            blocks_evicted=self.blocks_evicted,
            tokens_evicted=self.tokens_evicted,
        )
        self.blocks_evicted = self.tokens_evicted = 0

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for request in self.requests:
            self.preempt(request)
        self.requests = []
        self.metrics_say_what_happened()
        self.every_block_is_free_or_held()
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert self.manager.reset_prefix_cache()


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None
)


def read_text(manager: Any, request: Request, chunk: int) -> None:
    """Prefill ``request`` to its last token in chunks."""
    blocks, num_hit, _ = manager.get_computed_blocks(request)
    hit = {"num_new_computed_tokens": num_hit, "new_computed_blocks": blocks}
    request.num_computed_tokens = 0
    read_on(manager, request, chunk, **hit)


def read_on(manager: Any, request: Request, chunk: int, **hit: Any) -> None:
    """Prefill the rest of ``request`` in chunks."""
    while request.num_computed_tokens < request.num_tokens:
        computed = request.num_computed_tokens + hit.get("num_new_computed_tokens", 0)
        new = min(chunk, request.num_tokens - computed)
        assert manager.allocate_slots(request, new, **hit) is not None
        request.num_computed_tokens, hit = computed + new, {}


def make_request(name: str, length: int, block_size: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(length)),
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        block_hasher=get_request_block_hasher(block_size, sha256),
    )


def test_hit_after_eviction_finds_pinned_blocks_and_window() -> None:
    """A chat that resends its history: evicted blocks in the middle may be gone."""
    window, block_size = SinkWindow(4, 32), 16
    spec = make_spec(window, block_size)
    num_blocks = 1 + spec.blocks.max_blocks(MAX_CHUNK) + 2
    manager = make_manager(num_blocks, True, spec)
    first = make_request("first", 40 * block_size, block_size)
    read_text(manager, first, MAX_CHUNK)
    manager.free(first)

    again = make_request("again", 40 * block_size + 5, block_size)
    blocks, num_hit, _ = manager.get_computed_blocks(again)
    assert num_hit == 40 * block_size
    real = [i for i, block in enumerate(blocks.blocks[0]) if not block.is_null]
    assert real == [0, 38, 39]


def test_no_hit_without_the_pinned_block() -> None:
    window, block_size = SinkWindow(4, 32), 16
    spec = make_spec(window, block_size)
    manager = make_manager(64, True, spec)
    first = make_request("first", 20 * block_size, block_size)
    read_text(manager, first, MAX_CHUNK)
    pinned = manager.get_blocks("first").blocks[0][0]
    manager.free(first)
    manager.evict_blocks({pinned.block_id})
    again = make_request("again", 20 * block_size, block_size)
    assert manager.get_computed_blocks(again)[1] == 0


@pytest.mark.parametrize("read", [20, 40, 400])
def test_a_session_goes_on_in_a_pool_smaller_than_its_text(read: int) -> None:
    """Its next piece is admitted by what a stream keeps, as a new prompt is."""
    block_size = 16
    spec = make_spec(SinkWindow(4, 60), block_size)
    bound = spec.blocks.max_blocks(MAX_CHUNK)
    manager = make_manager(1 + bound, False, spec)
    request = make_request("session", read, block_size)
    read_text(manager, request, MAX_CHUNK)
    request._all_token_ids.extend(range(1000))
    request.num_prompt_tokens = request.num_tokens
    assert manager.allocate_slots(request, MAX_CHUNK, full_sequence_must_fit=True)
    request.num_computed_tokens += MAX_CHUNK
    read_on(manager, request, MAX_CHUNK)
    held = [b for b in manager.get_blocks("session").blocks[0] if not b.is_null]
    assert len(held) <= bound
    # Beside a stream that holds a block more than is left, it waits.
    other = make_manager(bound, False, spec)
    request = make_request("session", 20, block_size)
    read_text(other, request, MAX_CHUNK)
    request._all_token_ids.extend(range(1000))
    request.num_prompt_tokens = request.num_tokens
    assert not other.allocate_slots(request, MAX_CHUNK, full_sequence_must_fit=True)


def test_capacity_is_the_bounded_number() -> None:
    spec = make_spec(SinkWindow(4, 100), 16)
    assert spec.max_admission_blocks_per_request(64, 10**9) == 1 + 11 + 1
    assert spec.max_admission_blocks_per_request(64, 1) == 1 + 11 + 1
