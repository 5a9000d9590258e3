# SPDX-License-Identifier: Apache-2.0
"""The same text gives the same losses and tokens, however it was scheduled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from sink_paged.window import BlockWindow, SinkWindow
from tests.engines import (
    check_prefix_hits,
    continuations,
    core,
    engine,
    forget,
    generate,
    greedy,
    kv_cache_manager,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.undisturbed import READ, SINKS, TEXT, TOLERANCE, Undisturbed, text

BLOCK_SIZE = 16
MAX_BATCHED = 1024


@pytest.fixture(scope="module")
def llm(small_llama: Path) -> Iterator[LLM]:
    with engine(
        small_llama, SINKS, block_size=BLOCK_SIZE, max_num_batched_tokens=MAX_BATCHED
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> Undisturbed:
    return Undisturbed.of(llm)


@pytest.mark.parametrize("chunk", [16, 37, 1024])
def test_prefill_chunks(
    llm: LLM,
    undisturbed: Undisturbed,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(llm)
    scheduler = core(llm).scheduler
    chunks = []
    schedule = scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        chunks.append(step.total_num_scheduled_tokens)
        return step

    monkeypatch.setattr(scheduler, "schedule", counted)
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", chunk)
    read = generate(llm, [TEXT], READ)[0]
    assert max(chunks) == min(chunk, len(TEXT))
    forget(llm)
    written = continuations(llm, [TEXT])[0]
    assert worst(prompt_losses(read), undisturbed.losses) < TOLERANCE
    assert written == undisturbed.tokens


def test_among_others(llm: LLM, undisturbed: Undisturbed) -> None:
    forget(llm)
    lengths = [1, 5, 64, 65, 200, 333, 1500]
    prompts = [TEXT, *(text(length, seed=length) for length in lengths)]
    read = generate(llm, prompts, READ)[0]
    assert worst(prompt_losses(read), undisturbed.losses) < TOLERANCE
    forget(llm)
    assert continuations(llm, prompts)[0] == undisturbed.tokens
    assert pool_is_empty(llm)


def test_prefix_cache_hit_after_eviction(llm: LLM, undisturbed: Undisturbed) -> None:
    """A chat turn resends its history, long past the window: the hit spans it."""
    assert check_prefix_hits(llm, TEXT, BLOCK_SIZE) == undisturbed.tokens


def test_blocks_are_bounded(llm: LLM) -> None:
    """One request 40 windows long never holds more than the bound, and frees it all."""
    forget(llm)
    policy = BlockWindow(SinkWindow(*SINKS), BLOCK_SIZE)
    length = 40 * SINKS[1]
    llm_engine = llm.llm_engine
    params = greedy(length - 900)
    llm_engine.add_request("long", {"prompt_token_ids": text(900, 3)}, params)
    held, decoding = [], []
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
        rows = kv_cache_manager(llm).coordinator.single_type_managers[0].req_to_blocks
        for row in rows.values():
            held.append(sum(not block.is_null for block in row))
            if len(row) * BLOCK_SIZE > 1000:
                decoding.append(held[-1])
    assert len(decoding) > length - 1100
    assert max(held) <= policy.max_blocks(MAX_BATCHED)
    assert max(decoding) <= policy.max_blocks(1)
    assert pool_is_empty(llm)
