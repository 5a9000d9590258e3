# SPDX-License-Identifier: Apache-2.0
"""Cases of ``tests.v2_cases``: speculative decoding on model runner V2."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from tests.engines import (
    GOLDEN,
    core,
    engine,
    first_near_tie,
    generate,
    greedy,
    make_llama,
    pool_is_empty,
)

WINDOW = (4, 60)
DRAFTS = 3
SURE = 2e-4
"""Gap of the two best log-probabilities that no order of summation closes."""
GOLD = json.loads((GOLDEN / "golden.json").read_text())
IDS: list[int] = GOLD["ids"]
LOOP = [256, *([5, 9, 17, 3] * 20)]
PROMPTS = [IDS[:150], IDS[:90], LOOP, IDS[5:60]]
"""Three begin past the window, one passes it."""
LENGTHS = [30, 24, 40, 20]


def requests(bad_word: list[int]) -> list[SamplingParams]:
    """A request of each kind, in the order of the prompts."""
    penalties = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
    }
    changes: list[dict[str, Any]] = [
        {},
        penalties,
        {"allowed_token_ids": list(range(12))},
        {"min_tokens": 15},
    ]
    params = [
        greedy(length, logprobs=2, **change)
        for length, change in zip(LENGTHS, changes, strict=True)
    ]
    params[3]._bad_words_token_ids = [bad_word]
    return params


class Written(NamedTuple):
    """What a request has written, its tokens' log-probabilities, the gaps to others."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


def write(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[Written]:
    written = []
    for output in generate(llm, prompts, params):
        tokens = list(output.outputs[0].token_ids)
        entries = output.outputs[0].logprobs
        ranked = [
            sorted((e.logprob for e in entry.values()), reverse=True)
            for entry in entries
        ]
        chosen = [
            entry[token].logprob for entry, token in zip(entries, tokens, strict=True)
        ]
        written.append(Written(tokens, chosen, [best[0] - best[1] for best in ranked]))
    assert pool_is_empty(llm)
    return written


def check_same(mine: list[Written], alone: list[Written]) -> None:
    """Tokens and their log-probabilities, up to where float32 may choose either."""
    for text, other in zip(mine, alone, strict=True):
        sure = next(
            (i for i, gap in enumerate(other.gaps) if gap < SURE), len(other.gaps)
        )
        assert sure > 10
        assert text.tokens[:sure] == other.tokens[:sure]
        assert len(text.tokens) == len(other.tokens)
        assert text.logprobs[:sure] == pytest.approx(other.logprobs[:sure], abs=1e-3)


def drafts(llm: LLM) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return (
        values["vllm:spec_decode_num_draft_tokens"],
        values["vllm:spec_decode_num_accepted_tokens"],
    )


@contextmanager
def speculating(config: dict[str, Any], **options: Any) -> Iterator[LLM]:
    """An engine with a drafter."""
    options = {
        "speculative_config": config | {"num_speculative_tokens": DRAFTS},
        "max_num_batched_tokens": 64,
        "disable_log_stats": False,
        "logprobs_mode": "processed_logprobs",
    } | options
    with engine(GOLDEN, WINDOW, **options) as llm:
        yield llm


def almost_golden(folder: Path) -> None:
    """Write a model that often guesses what the golden one says, and often not."""
    model = LlamaForCausalLM.from_pretrained(GOLDEN).float()
    torch.manual_seed(1)
    for weight in model.parameters():
        noise = torch.randn_like(weight) * weight.std() if weight.dim() > 1 else 0
        weight.data += 0.01 * noise
    model.save_pretrained(folder)


def async_scheduling(patch: pytest.MonkeyPatch) -> None:
    """Let engines on the CPU schedule as on a GPU: vLLM turns it off at the end."""
    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep_asked(cls: type, vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    patch.setattr(platform, "check_and_update_config", classmethod(keep_asked))


def speculation() -> None:
    """The tokens of decoding one by one, whoever drafts and whatever is preempted."""
    options = {
        "max_num_batched_tokens": 64,
        "logprobs_mode": "processed_logprobs",
        "async_scheduling": False,
    }
    with engine(GOLDEN, WINDOW, **options) as llm:
        first = write(llm, PROMPTS[3:], [greedy(8, logprobs=2)])
        params = requests(first[0].tokens[4:6])
        alone = write(llm, PROMPTS, params)
    assert alone[3].tokens[:5] == first[0].tokens[:5]
    assert alone[3].tokens[5] != first[0].tokens[5]
    with tempfile.TemporaryDirectory() as folder:
        drafts_by_itself(alone, params)
        drafts_by_n_grams(alone, params)
        drafts_of_other_heads(Path(folder) / "heads", alone, params)
        preempted_and_scheduled_ahead(Path(folder) / "almost", alone, params)


def drafts_by_itself(alone: list[Written], params: list[SamplingParams]) -> None:
    """The model as its own drafter is always right, if both see the same context."""
    with speculating({"method": "draft_model", "model": str(GOLDEN)}) as llm:
        assert type(core(llm).scheduler).__name__ == "Scheduler"
        check_same(write(llm, PROMPTS[:1], params[:1]), alone[:1])
        drafted, right = drafts(llm)
    assert right > 0.9 * drafted > 0


def drafts_by_n_grams(alone: list[Written], params: list[SamplingParams]) -> None:
    config = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with speculating(config) as llm:
        check_same(write(llm, PROMPTS, params), alone)
        drafted, right = drafts(llm)
    assert 0 < right < drafted


def drafts_of_other_heads(
    folder: Path, alone: list[Written], params: list[SamplingParams]
) -> None:
    make_llama(folder, num_hidden_layers=1, num_key_value_heads=4, head_dim=64)
    with speculating({"method": "draft_model", "model": str(folder)}) as llm:
        short = params[1].clone()
        short.max_tokens = 12
        (text,) = write(llm, PROMPTS[1:2], [short])
        drafted, right = drafts(llm)
    assert text.tokens == alone[1].tokens[:12]
    assert right < drafted


def preempted_and_scheduled_ahead(
    folder: Path, alone: list[Written], params: list[SamplingParams]
) -> None:
    """In a pool that does not hold all streams, a step ahead of what is known."""
    almost_golden(folder)
    preempted = []
    with pytest.MonkeyPatch.context() as patch:
        async_scheduling(patch)
        with speculating(
            {"method": "draft_model", "model": str(folder)},
            async_scheduling=True,
            block_size=16,
            num_gpu_blocks_override=22,
        ) as llm:
            scheduler = core(llm).scheduler
            assert type(scheduler).__name__ == "AsyncScheduler"
            preempt = scheduler._preempt_request

            def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
                preempted.append(request.num_output_tokens)
                return preempt(request, *args, **kwargs)

            scheduler._preempt_request = counted
            check_same(write(llm, PROMPTS, params), alone)
            drafted, right = drafts(llm)
    assert 0 < right < drafted
    assert max(preempted) > 0


def speculation_cuda() -> None:
    """By our CUDA backend, shorter: the greedy tokens of the 2023 code."""
    reference = GOLD["res"]["greedy_4+60"]
    count = 24
    assert first_near_tie(reference["top2_gap"]) > count
    prompt = IDS[: reference["prompt_len"]]
    with tempfile.TemporaryDirectory() as folder:
        almost_golden(Path(folder))
        with speculating({"method": "draft_model", "model": folder}) as llm:
            (text,) = write(llm, [prompt], [greedy(count, logprobs=2)])
            drafted, right = drafts(llm)
    assert text.tokens == reference["tokens"][:count]
    assert 0 < right < drafted


CASES = (speculation, speculation_cuda)
