# SPDX-License-Identifier: Apache-2.0
"""Cases of ``tests.v2_cases``: speculative decoding on model runner V2."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu.input_batch import post_update
from vllm.v1.worker.gpu.states import RequestState

from sink_paged.runner_v2 import requests
from sink_paged.runner_v2.requests import StreamRequestState
from tests.engines import (
    GOLDEN,
    async_scheduling,
    core,
    engine,
    first_near_tie,
    generate,
    greedy,
    has_v2_drafter,
    make_llama,
    pool_is_empty,
    vllm_since,
)

WINDOW = (4, 60)
DRAFTS = 3
SURE = 2e-4
"""Gap of the two best log-probabilities that no order of summation closes."""
GOLD = json.loads((GOLDEN / "golden.json").read_text())
IDS: list[int] = GOLD["ids"]
LOOP = [256, *([5, 9, 17, 3] * 20)]
PROMPTS = [IDS[:150], LOOP, IDS[5:60]]
"""Two begin past the window, one passes it."""
LENGTHS = [18, 22, 16]
PENALTIES = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.1,
}


def asked(bad_word: list[int]) -> list[SamplingParams]:
    """A request of each kind, in the order of the prompts."""
    few_tokens = {"allowed_token_ids": list(range(12))}
    params = [
        greedy(length, logprobs=2, **changes)
        for length, changes in zip(LENGTHS, ({}, few_tokens, PENALTIES), strict=True)
    ]
    params[2]._bad_words_token_ids = [bad_word]
    return params


def runner_of(llm: LLM) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


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
        entries = output.outputs[0].logprobs or []
        ranked = [
            sorted((e.logprob for e in entry.values()), reverse=True)
            for entry in entries
        ]
        chosen = [
            entry[token].logprob for entry, token in zip(entries, tokens, strict=False)
        ]
        written.append(Written(tokens, chosen, [best[0] - best[1] for best in ranked]))
    assert pool_is_empty(llm)
    return written


def without_logprobs(params: list[SamplingParams]) -> list[SamplingParams]:
    """The same requests, cheaper in the interpreter."""
    copies = [one.clone() for one in params]
    for one in copies:
        one.logprobs = None
    return copies


def check_same(mine: list[Written], alone: list[Written]) -> None:
    """Tokens and their log-probabilities, up to where float32 may choose either."""
    for text, other in zip(mine, alone, strict=True):
        sure = next(
            (i for i, gap in enumerate(other.gaps) if gap < SURE), len(other.gaps)
        )
        assert sure > 10
        assert text.tokens[:sure] == other.tokens[:sure]
        assert len(text.tokens) == len(other.tokens)
        if text.logprobs:
            assert text.logprobs[:sure] == pytest.approx(
                other.logprobs[:sure], abs=1e-3
            )


def drafts(llm: LLM) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return (
        values["vllm:spec_decode_num_draft_tokens"],
        values["vllm:spec_decode_num_accepted_tokens"],
    )


@contextmanager
def speculating(
    config: dict[str, Any], window: tuple[int, int] | None = WINDOW, **options: Any
) -> Iterator[LLM]:
    """An engine with a drafter."""
    options = {
        "speculative_config": config | {"num_speculative_tokens": DRAFTS},
        "max_num_batched_tokens": 64,
        "disable_log_stats": False,
        "logprobs_mode": "processed_logprobs",
        "async_scheduling": False,
    } | options
    if window is not None:  # the most that is resident, which the texts go past
        options["max_model_len"] = 1 + sum(window)
    with engine(GOLDEN, window, **options) as llm:
        yield llm


def almost_golden(folder: Path) -> None:
    """Write a model that often guesses what the golden one says, and often not."""
    model = LlamaForCausalLM.from_pretrained(GOLDEN).float()
    torch.manual_seed(1)
    for weight in model.parameters():
        noise = torch.randn_like(weight) * weight.std() if weight.dim() > 1 else 0
        weight.data += 0.01 * noise
    model.save_pretrained(folder)


def speculation() -> None:
    """The tokens of decoding one by one, whoever drafts and whatever is preempted."""
    options = {
        "max_num_batched_tokens": 64,
        "logprobs_mode": "processed_logprobs",
        "async_scheduling": False,
    }
    with engine(GOLDEN, WINDOW, **options) as llm:
        begin = greedy(6, logprobs=2, **PENALTIES)
        (first,) = write(llm, PROMPTS[2:], [begin])
        params = asked(first.tokens[4:6])
        alone = write(llm, PROMPTS, params)
    assert alone[2].tokens[:5] == first.tokens[:5]
    assert alone[2].tokens[5] != first.tokens[5]
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        async_scheduling(patch)
        drafts_by_itself(alone, params)
        if has_v2_drafter("ngram"):
            drafts_by_n_grams("ngram_gpu", alone, params)
        if vllm_since("0.33.0"):  # which schedules this method a step ahead too
            drafts_by_n_grams("ngram", alone, params)
        drafts_of_other_heads(Path(folder) / "heads", alone)
        preempted_and_scheduled_ahead(Path(folder) / "almost", alone, params)


def drafts_by_itself(alone: list[Written], params: list[SamplingParams]) -> None:
    """The model as its own drafter is always right, if both see the same context."""
    with speculating({"method": "draft_model", "model": str(GOLDEN)}) as llm:
        assert type(core(llm).scheduler).__name__ == "Scheduler"
        check_same(write(llm, PROMPTS[:1], without_logprobs(params[:1])), alone[:1])
        drafted, right = drafts(llm)
    assert right > 0.9 * drafted > 0


def drafts_by_n_grams(
    method: str, alone: list[Written], params: list[SamplingParams]
) -> None:
    """Looked up in rows that slide, a step ahead of what is known."""
    config = {"method": method, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    resident = 1 + sum(WINDOW)
    with speculating(config, async_scheduling=True) as llm:
        assert type(core(llm).scheduler).__name__ == "AsyncScheduler"
        rows = runner_of(llm).req_states
        assert rows.tail == resident
        assert rows.all_token_ids.gpu.shape[1] < len(PROMPTS[0]) + LENGTHS[0]
        check_same(write(llm, PROMPTS, without_logprobs(params)), alone)
        drafted, right = drafts(llm)
    assert 0 < right < drafted


def drafts_of_other_heads(folder: Path, alone: list[Written]) -> None:
    make_llama(folder, num_hidden_layers=1, num_key_value_heads=4, head_dim=64)
    with speculating({"method": "draft_model", "model": str(folder)}) as llm:
        (text,) = write(llm, PROMPTS[:1], [greedy(6)])
        drafted, right = drafts(llm)
    assert text.tokens == alone[0].tokens[:6]
    assert right < drafted


def preempted_and_scheduled_ahead(
    folder: Path, alone: list[Written], params: list[SamplingParams]
) -> None:
    """In a pool that does not hold all streams, a step ahead of what is known."""
    almost_golden(folder)
    preempted = []
    with speculating(
        {"method": "draft_model", "model": str(folder)},
        async_scheduling=True,
        block_size=16,
        num_gpu_blocks_override=18,
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
    begun, count = 12, 17
    assert first_near_tie(reference["top2_gap"]) > count
    prompt = IDS[: reference["prompt_len"]] + reference["tokens"][:begun]
    with tempfile.TemporaryDirectory() as folder:
        almost_golden(Path(folder))
        with speculating({"method": "draft_model", "model": folder}) as llm:
            (text,) = write(llm, [prompt], [greedy(count - begun)])
            drafted, right = drafts(llm)
    assert len(prompt) + count - begun > 1 + sum(WINDOW)
    assert text.tokens == reference["tokens"][begun:count]
    assert 0 < right < drafted


def speculation_seeds() -> None:
    """Random tokens: those of stock vLLM with the same drafter, where it has all."""
    config = {"method": "draft_model", "model": str(GOLDEN)}
    prompts = [IDS[:90]]
    params = [greedy(8, logprobs=2, temperature=1.0, seed=4, repetition_penalty=1.2)]
    written = {}
    for window in (None, (4, 251)):
        with speculating(config, window) as llm:
            written[window] = write(llm, prompts, params)
            drafted, right = drafts(llm)
        assert 0 < right < drafted
    for mine, stock in zip(written[4, 251], written[None], strict=True):
        assert mine.tokens == stock.tokens
        assert mine.logprobs == pytest.approx(stock.logprobs, abs=1e-3)


def n_grams() -> None:
    """What is drafted from rows that slide, against a search of each text's end."""
    from vllm.v1.worker.cpu import shm  # noqa: F401  (makes vLLM's buffers the CPU's)

    from sink_paged.runner_v2.ngram import StreamNgramSpeculator  # from vLLM 0.32 on

    chance = random.Random(1)
    resident, most, prompt = 64, 3, 70
    states = RequestState(4, 64, 64, DRAFTS, 320, torch.device("cpu"))
    streams = StreamRequestState.adopt(states, resident)
    drafter = StreamNgramSpeculator(ngram_config(most), states.device, streams)
    texts: list[list[int]] = [
        [chance.randrange(3) for _ in range(prompt * row)] for row in range(1, 3)
    ]
    for row, text in enumerate(texts):
        streams.add_request(str(row), len(text), text, len(text) - 1, 999)
    streams.apply_staged_writes()
    rows = np.array([streams.req_id_to_index[str(row)] for row in range(len(texts))])
    batch = SimpleNamespace(num_reqs=len(rows), idx_mapping=torch.from_numpy(rows))
    found = 0
    for _ in range(30):
        streams.make_room(rows)
        sampled = torch.randint(0, 3, (len(rows), 1 + DRAFTS))
        counts = torch.tensor([chance.randrange(2 + DRAFTS) for _ in rows])
        post_update(
            batch.idx_mapping,
            streams.num_computed_tokens.gpu,
            streams.last_sampled_tokens,
            None,
            sampled,
            counts.int(),
            torch.zeros(len(rows), dtype=torch.int32),
            None,
            streams.all_token_ids.gpu,
            streams.total_len.gpu,
        )
        drafted = drafter.propose(
            batch,
            *[None] * 4,
            num_sampled=counts,
            num_rejected=None,
            last_sampled=streams.last_sampled_tokens,
            next_prefill_tokens=None,
            temperature=None,
            seeds=None,
        ).tolist()
        for text, new, count, draft in zip(
            texts, sampled.tolist(), counts.tolist(), drafted, strict=True
        ):
            text += new[:count]
            if count:
                expected = follow(text[-resident:], most)
                assert draft[: len(expected)] == expected
                assert draft[len(expected) :] == text[-1:] * (DRAFTS - len(expected))
                found += bool(expected)
    assert found > 30
    assert min(len(text) for text in texts) > resident + requests.SPARE_TOKENS


def follow(text: list[int], most: int) -> list[int]:
    """What followed the last of the longest n-grams equal to the text's end."""
    for length in range(most, 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                return text[start + length :][:DRAFTS]
    return []


def ngram_config(most: int) -> Any:
    """As much of a config as the drafter reads."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            prompt_lookup_min=1, prompt_lookup_max=most, num_speculative_tokens=DRAFTS
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=64),
    )


CASES = (speculation, speculation_cuda, speculation_seeds, n_grams)
