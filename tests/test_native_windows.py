# SPDX-License-Identifier: Apache-2.0
"""Models whose layers have sliding windows of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.against_oracle import check_family
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
    vllm_since,
    worst,
)
from tests.families import MIXED, SLIDING, make_model, text
from tests.oracle import stream_losses
from tests.oracle_hf import StreamingModel

SINKS = (4, 60)
BLOCK_SIZE = 16
MAX_BATCHED = 512
TEXT = text(500)
READ = greedy(1, prompt_logprobs=0)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    make_model(MIXED, folder)
    return folder


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    options = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": MAX_BATCHED}
    with engine(model, SINKS, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def losses(llm: LLM) -> list[float]:
    """In one chunk, alone, with a cold cache."""
    return prompt_losses(generate(llm, [TEXT], READ)[0])


def test_several_groups_are_exact(llm: LLM, losses: list[float]) -> None:
    windows = [
        (str(manager.blocks.window), len(group.layer_names))
        for manager, group in zip(
            kv_cache_manager(llm).coordinator.single_type_managers,
            kv_cache_manager(llm).kv_cache_config.kv_cache_groups,
            strict=True,
        )
    ]
    assert sorted(windows) == [("0+39", 1), ("0+39", 2), ("4+60", 2)]
    expected = stream_losses(StreamingModel(make_model(MIXED), *SINKS), TEXT)
    assert worst(losses, expected) < 1e-3


@pytest.mark.parametrize("chunk", [16, 37])
def test_prefill_chunks(llm: LLM, losses: list[float], chunk: int) -> None:
    forget(llm)
    scheduler = core(llm).scheduler.scheduler_config
    scheduler.long_prefill_token_threshold = chunk
    try:
        read = generate(llm, [TEXT, *(text(n) for n in (1, 41, 65, 300))], READ)[0]
    finally:
        scheduler.long_prefill_token_threshold = 0
    assert worst(prompt_losses(read), losses) < TOLERANCE


def test_prefix_cache_hit_after_eviction(llm: LLM) -> None:
    """A hit needs the blocks of every group; each group has evicted others."""
    check_prefix_hits(llm, TEXT, BLOCK_SIZE)


def test_blocks_are_bounded(llm: LLM) -> None:
    """In each group, and all are given back."""
    forget(llm)
    managers = kv_cache_manager(llm).coordinator.single_type_managers
    llm.llm_engine.add_request("long", {"prompt_token_ids": TEXT}, greedy(500))
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        for manager in managers:
            for row in manager.req_to_blocks.values():
                held = sum(not block.is_null for block in row)
                assert held <= manager.blocks.max_blocks(MAX_BATCHED)
                if len(row) * BLOCK_SIZE > len(TEXT) + BLOCK_SIZE:
                    assert held <= manager.blocks.max_blocks(1)
                    steps += 1
    assert steps > 3 * 400
    assert pool_is_empty(llm)


# The tests from here on start engines of their own, which ends vLLM's distributed state
# of this process: the shared engine cannot run after them.


def test_preemption(model: Path) -> None:
    """The smallest pool for one stream, and streams that all outgrow their windows."""
    prompts = [[256, seed, *TEXT[2:20]] for seed in range(4)]
    options = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 64}
    with engine(model, SINKS, **options) as llm:
        roomy = continuations(llm, prompts, 200)
        managers = kv_cache_manager(llm).coordinator.single_type_managers
        bound = sum(manager.blocks.max_blocks(64) for manager in managers)
    options |= {"num_gpu_blocks_override": bound + 1, "disable_log_stats": False}
    with engine(model, SINKS, **options) as llm:
        crowded = continuations(llm, prompts, 200)
        stats = {metric.name: metric for metric in llm.get_metrics()}
        assert stats["vllm:num_preemptions"].value > 0
        assert pool_is_empty(llm)
    assert crowded == roomy


def test_too_little_memory_is_refused_in_terms_of_a_stream(model: Path) -> None:
    """The bound counts every group, and a block is as wide as the widest."""
    layers, page = 2, BLOCK_SIZE * 2 * 2 * 32 * 4
    blocks = (1 + -(-(60 + 64) // 16) + 1) + 2 * (-(-(39 + 64) // 16) + 1)
    needed = layers * page * blocks
    options = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 64}
    with (
        pytest.raises(ValueError, match=r"but a stream with cache config 4\+60"),
        engine(model, SINKS, kv_cache_memory_bytes=needed - 1, **options),
    ):
        pass


def test_one_kind_of_group_for_all_layers_is_refused(model: Path) -> None:
    with (
        pytest.raises(ValueError, match="--disable-hybrid-kv-cache-manager"),
        engine(model, SINKS, disable_hybrid_kv_cache_manager=True),
    ):
        pass


GPT_OSS = pytest.param(
    "gpt-oss",
    marks=pytest.mark.skipif(
        not vllm_since("0.31.0"),
        reason="vLLM's own CPU kernel takes learned sinks in bfloat16 only",
    ),
)


@pytest.mark.family
@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3", GPT_OSS])
def test_global_layers_stream_and_sliding_layers_slide(
    family: str, tmp_path: Path
) -> None:
    check_family(family, tmp_path, SINKS, 60)


@pytest.mark.family
@pytest.mark.parametrize("family", [SLIDING])
def test_sinks_join_the_window_that_every_layer_has(
    family: str, tmp_path: Path
) -> None:
    check_family(family, tmp_path, (4, 59), 60, keep_native=False)
