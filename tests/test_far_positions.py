# SPDX-License-Identifier: Apache-2.0
"""A text whose attended tokens repeat has the same losses wherever it stands."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import LLM
from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from tests.engines import (
    GOLDEN,
    core,
    engine,
    generate,
    greedy,
    kv_cache_manager,
    pool_is_empty,
    worst,
)

SINKS = (4, 60)
PERIOD = 50
NEAR = 1_000
FAR = 1_000_000
BLOCK = 32


def periodic(length: int) -> list[int]:
    """Sinks, then a period again and again; same phase at every multiple of it."""
    period = [(17 * i * i + 5) % 251 for i in range(PERIOD)]
    return [256, 1, 2, 3, *period * (length // PERIOD)]


def losses_of(completion: Any) -> list[float]:
    assert completion.logprobs is not None
    return [
        -entry[token].logprob
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


@pytest.mark.slow
def test_a_million_tokens_on() -> None:
    """Read in chunks, then written: 60 tokens with their log-probabilities."""
    written = []
    with engine(GOLDEN, SINKS, max_num_batched_tokens=8192) as llm:
        for length in (NEAR, FAR):
            output = generate(llm, [periodic(length)], greedy(60, logprobs=0))[0]
            completion = output.outputs[0]
            written.append((list(completion.token_ids), losses_of(completion)))
    (near_tokens, near_losses), (far_tokens, far_losses) = written
    assert near_tokens == far_tokens
    assert worst(near_losses, far_losses) < 1e-3


def written_at(llm: LLM, monkeypatch: pytest.MonkeyPatch, offset: int) -> Any:
    """What a stream writes whose prompt begins anew ``offset`` tokens on.

    The scheduler is told that all tokens before are computed and evicted: only the
    pinned block is there, shared with a running stream of the same beginning. The
    window is that of the null block until the prompt's end has filled it.
    """
    assert offset % BLOCK == 0
    beginning, end = periodic(10 * PERIOD)[:BLOCK], periodic(10 * PERIOD)[4:]
    llm.llm_engine.add_request("near", {"prompt_token_ids": beginning}, greedy(10**6))
    llm.llm_engine.step()
    llm.llm_engine.step()
    manager = kv_cache_manager(llm)
    (blocks,) = manager.coordinator.get_blocks(next(iter(core(llm).scheduler.requests)))
    null = manager.block_pool.null_block
    hit = KVCacheBlocks(([blocks[0]] + [null] * (offset // BLOCK),))
    with monkeypatch.context() as patch:
        patch.setattr(
            manager, "get_computed_blocks", lambda *_: (hit, BLOCK + offset, 0)
        )
        prompt = {"prompt_token_ids": beginning + [7] * offset + end}
        llm.llm_engine.add_request("far", prompt, greedy(60, logprobs=0))
        finished: list[Any] = []
        while not finished:
            finished = [out for out in llm.llm_engine.step() if out.finished]
    llm.llm_engine.abort_request(["near"])
    return finished[0].outputs[0]


@pytest.mark.slow
def test_far_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses a million, ten million and a hundred million tokens on, as at 1,024."""
    with engine(GOLDEN, SINKS, enable_prefix_caching=False) as llm:
        near = written_at(llm, monkeypatch, 1024)
        for offset in (10**6, 10**7, 10**8):
            far = written_at(llm, monkeypatch, offset)
            assert list(far.token_ids) == list(near.token_ids)
            assert worst(losses_of(far), losses_of(near)) < 1e-3
        llm.llm_engine.step()
        assert pool_is_empty(llm)
