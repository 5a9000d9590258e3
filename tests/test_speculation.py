# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of streams: the tokens are those of decoding one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.config import vllm as vllm_config_module
from vllm.engine.arg_utils import AsyncEngineArgs

from sink_paged import engine as engine_settings
from tests.engines import (
    GOLDEN,
    NEAR_TIE,
    async_scheduling,
    engine,
    forget,
    generate,
    greedy,
    has_v2_drafter,
    make_llama,
    pool_is_empty,
    vllm_since,
)

SINKS = (4, 60)
DRAFTS = 3
PROMPTS = [
    [256, *range(1, 40)],
    [256, *(i * 7 % 251 for i in range(300))],
    [256, *([5, 9, 17, 3] * 50)],
    [256, 8],
]
OUTPUTS = 200
PARAMS = {
    "greedy": {},
    "penalties": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    },
    "few tokens": {"allowed_token_ids": list(range(30)), "repetition_penalty": 1.1},
}


def sampling(name: str) -> SamplingParams:
    return greedy(OUTPUTS, logprobs=2, **PARAMS[name])


def run(llm: LLM, name: str) -> list[Any]:
    outputs = generate(llm, PROMPTS, sampling(name))
    assert pool_is_empty(llm)
    return [output.outputs[0] for output in outputs]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Any]]:
    """Outputs without speculation."""
    with engine(GOLDEN, SINKS, logprobs_mode="processed_logprobs") as llm:
        return {name: run(llm, name) for name in PARAMS}


def draft_model(folder: Path, **changes: Any) -> dict[str, Any]:
    """A settings of a drafter that often guesses right, and often wrong."""
    make_llama(folder, **changes)
    return {"method": "draft_model", "model": str(folder)}


DRAFTERS = {
    "ngram": lambda folder: {
        "method": "ngram",
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    },
    "itself": lambda folder: {"method": "draft_model", "model": str(GOLDEN)},
    "another model": draft_model,
    "other heads": lambda folder: draft_model(
        folder, num_hidden_layers=1, num_key_value_heads=4, head_dim=64
    ),
}


@pytest.fixture(scope="module", params=DRAFTERS)
def speculating(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    alone: dict[str, list[Any]],  # its engine is gone before another starts
) -> Iterator[tuple[str, LLM]]:
    drafter = request.param
    config = DRAFTERS[drafter](tmp_path_factory.mktemp("draft"))
    config["num_speculative_tokens"] = DRAFTS
    options = {
        "max_num_batched_tokens": 128,
        "disable_log_stats": False,
        "logprobs_mode": "processed_logprobs",
    }
    with engine(GOLDEN, SINKS, speculative_config=config, **options) as llm:
        yield drafter, llm


def accepted(llm: LLM) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return (
        values["vllm:spec_decode_num_draft_tokens"],
        values["vllm:spec_decode_num_accepted_tokens"],
    )


drafts_on_v1 = pytest.mark.skipif(
    vllm_since("0.30.0") and not vllm_since("0.31.0"),
    reason="vLLM 0.30's CPU build has no kernel that verifies drafts",
)


@drafts_on_v1
@pytest.mark.parametrize("name", PARAMS)
def test_same_tokens(
    speculating: tuple[str, LLM], alone: dict[str, list[Any]], name: str
) -> None:
    """Also where the prompts, and what was drafted of them, are in the prefix cache."""
    drafter, llm = speculating
    forget(llm)
    for cached in (False, True):
        before = accepted(llm)
        check_same(run(llm, name), alone[name])
        drafted, right = (
            now - then for now, then in zip(accepted(llm), before, strict=True)
        )
        assert drafted > 100
        if drafter == "itself" and name == "greedy":
            assert right > 0.9 * drafted, f"it sees another context, {cached=}"


def check_same(outputs: list[Any], expected: list[Any]) -> None:
    """Up to a near-tie, where float32 may choose either."""
    same = 0
    for output, alone in zip(outputs, expected, strict=True):
        assert len(output.token_ids) == len(alone.token_ids) == OUTPUTS
        pairs = zip(output.token_ids, alone.token_ids, strict=True)
        differs = next((i for i, (a, b) in enumerate(pairs) if a != b), OUTPUTS)
        same += differs
        if differs < OUTPUTS:
            entries = alone.logprobs[differs].values()
            best, second, *_ = sorted((e.logprob for e in entries), reverse=True)
            assert best - second < NEAR_TIE, f"token {differs} is another"
    assert same > len(outputs) * OUTPUTS // 2


@drafts_on_v1
def test_preempted_while_speculating(alone: dict[str, list[Any]]) -> None:
    """In a pool that does not hold all streams."""
    config = {"method": "draft_model", "model": str(GOLDEN)}
    with engine(
        GOLDEN,
        SINKS,
        speculative_config=config | {"num_speculative_tokens": DRAFTS},
        max_num_batched_tokens=64,
        block_size=16,
        num_gpu_blocks_override=25,
        disable_log_stats=False,
    ) as llm:
        outputs = run(llm, "greedy")
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        assert counts["vllm:num_preemptions"] > 0
        check_same(outputs, alone["greedy"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "ngram_gpu", "num_speculative_tokens": 3}, "ngram_gpu.*runner V1"),
        (
            {
                "method": "draft_model",
                "model": str(GOLDEN),
                "num_speculative_tokens": 2,
                "kv_cache_dtype": "fp8",
            },
            "kv_cache_dtype",
        ),
        (
            {
                "method": "draft_model",
                "model": str(GOLDEN),
                "num_speculative_tokens": 2,
                "max_model_len": 100,
            },
            "at most 100 tokens",
        ),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    arguments = AsyncEngineArgs(
        model=str(GOLDEN),
        skip_tokenizer_init=True,
        speculative_config=config,
        additional_config={"sink_paged": {}},
    )
    with pytest.raises(ValueError, match=f"does not support.*{message}"):
        arguments.create_engine_config()


def engine_config(config: dict[str, Any], **options: Any) -> Any:
    """The config of an engine that would be started with a drafter."""
    return AsyncEngineArgs(
        model=str(GOLDEN),
        skip_tokenizer_init=True,
        speculative_config=config | {"num_speculative_tokens": 2},
        additional_config={"sink_paged": {}},
        **options,
    ).create_engine_config()


def with_runner_v2(patch: pytest.MonkeyPatch) -> None:
    """Let configs name model runner V2, for which a CPU has no Triton."""
    for module in (vllm_config_module, engine_settings):
        patch.setattr(module, "HAS_TRITON", True)


@pytest.mark.parametrize(
    ("runner", "ahead"), [("0", False)] + [("1", True)] * has_v2_drafter("draft_model")
)
def test_scheduled_ahead_on_runner_v2_only(
    runner: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM turns on by default where it has a GPU, is turned off for V1."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with_runner_v2(monkeypatch)
    async_scheduling(monkeypatch)
    config = engine_config({"method": "draft_model", "model": str(GOLDEN)})
    assert config.scheduler_config.async_scheduling is ahead
    scheduler = config.scheduler_config.get_scheduler_cls().__name__
    assert scheduler == ("AsyncScheduler" if ahead else "Scheduler")
