# SPDX-License-Identifier: Apache-2.0
"""The same text gives the same losses and tokens, whatever the engine's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sink_paged.window import BlockWindow, SinkWindow
from tests.engines import (
    continuations,
    engine,
    generate,
    greedy,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.undisturbed import READ, SINKS, TEXT, TOLERANCE, Undisturbed, text

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def undisturbed(small_llama: Path) -> Undisturbed:
    with engine(small_llama, SINKS, block_size=32, max_num_batched_tokens=1024) as llm:
        return Undisturbed.of(llm)


def test_prefix_caching_off(small_llama: Path, undisturbed: Undisturbed) -> None:
    with engine(small_llama, SINKS, enable_prefix_caching=False) as llm:
        read = generate(llm, [TEXT], READ)[0]
        assert worst(prompt_losses(read), undisturbed.losses) < TOLERANCE
        for _ in range(2):
            output = generate(llm, [TEXT], greedy(150))[0]
            assert not output.num_cached_tokens
            assert list(output.outputs[0].token_ids) == undisturbed.tokens


def test_preemption(small_llama: Path) -> None:
    """A pool for 2.5 streams, eight streams that all grow past the window."""
    prompts = [text(20, seed) for seed in range(7)] + [TEXT[:30]]
    policy = BlockWindow(SinkWindow(*SINKS), BLOCK_SIZE)
    blocks = policy.max_blocks(64) * 5 // 2
    options = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 64}
    with engine(small_llama, SINKS, **options) as llm:
        roomy = continuations(llm, prompts, 300)
    crowd = {"num_gpu_blocks_override": blocks, "disable_log_stats": False}
    with engine(small_llama, SINKS, **crowd, **options) as llm:
        crowded = generate(llm, prompts, greedy(300))
        stats = {metric.name: metric for metric in llm.get_metrics()}
        assert stats["vllm:num_preemptions"].value > 0
        assert pool_is_empty(llm)
    assert [list(output.outputs[0].token_ids) for output in crowded] == roomy


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_block_sizes(
    small_llama: Path, undisturbed: Undisturbed, block_size: int
) -> None:
    with engine(small_llama, SINKS, block_size=block_size) as llm:
        read = generate(llm, [TEXT], READ)[0]
        assert worst(prompt_losses(read), undisturbed.losses) < TOLERANCE
        assert continuations(llm, [TEXT])[0] == undisturbed.tokens
