# SPDX-License-Identifier: Apache-2.0
"""Requests of any length, their defaults, and bad ones among good ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from tests.engines import GOLDEN, core, engine, generate, greedy, pool_is_empty

RESIDENT = 128


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(GOLDEN, (4, 60), max_model_len=RESIDENT) as llm:
        yield llm


def sample(max_tokens: int | None, **changes: object) -> SamplingParams:
    settings = {"ignore_eos": True, "detokenize": False, **changes}
    return SamplingParams(max_tokens=max_tokens, **settings)


def prompt(length: int) -> list[int]:
    return [256, *(i * i % 251 for i in range(1, length))]


@pytest.mark.parametrize(
    ("length", "max_tokens", "expected"),
    [
        (10, None, RESIDENT - 10),  # as stock vLLM of that length
        (RESIDENT - 1, None, 1),
        (RESIDENT, None, RESIDENT - 1),  # stock would refuse; the most it could give
        (3 * RESIDENT, None, RESIDENT - 1),
        (10, 3 * RESIDENT, 3 * RESIDENT),  # asked for, so given
        (5 * RESIDENT, 200, 200),
    ],
)
def test_output_lengths(
    llm: LLM, length: int, max_tokens: int | None, expected: int
) -> None:
    output = generate(llm, [prompt(length)], sample(max_tokens))[0].outputs[0]
    assert len(output.token_ids) == expected
    assert output.finish_reason == "length"


def test_stop_conditions_end_a_stream(llm: LLM) -> None:
    free = generate(llm, [prompt(30)], greedy(400))[0].outputs[0]
    stop = free.token_ids[300]
    first = list(free.token_ids).index(stop)
    params = greedy(10**6, stop_token_ids=[stop])
    output = generate(llm, [prompt(30)], params)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert list(output.token_ids) == list(free.token_ids)[: first + 1]


def test_a_wrong_request_is_refused_and_the_others_go_on(llm: LLM) -> None:
    llm_engine = llm.llm_engine
    good = {"prompt_token_ids": prompt(300)}
    llm_engine.add_request("before", good, greedy(20))
    for name, tokens, params, error in [
        ("empty", [], greedy(5), "cannot be empty"),
        ("logprobs", [1, 2], greedy(5, logprobs=1000), "logprobs"),
        ("min", prompt(20), sample(None, min_tokens=5000), "min_tokens=5000 is above"),
    ]:
        with pytest.raises((ValueError, VLLMValidationError), match=error):
            llm_engine.add_request(name, {"prompt_token_ids": tokens}, params)
    llm_engine.add_request("after", good, greedy(20))
    finished = {}
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    assert set(finished) == {"before", "after"}
    assert finished["before"] == finished["after"]
    assert pool_is_empty(llm)


def test_a_prompt_that_memory_cannot_hold_is_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, with what it needs; also for the log-probabilities it asks for."""
    monkeypatch.setattr(
        "vllm.model_executor.model_loader.weight_utils._get_available_ram_bytes",
        lambda: 70 << 20,
    )
    for length, scored in ((600_000, None), (100_000, 1)):
        params = greedy(1, prompt_logprobs=scored)
        with pytest.raises(VLLMValidationError, match=r"host memory.* 70 MiB are free"):
            generate(llm, [prompt(length)], params)
    fits = generate(llm, [prompt(2_000)], greedy(1, prompt_logprobs=1))[0]
    assert fits.prompt_logprobs is not None
    assert len(fits.prompt_logprobs) == 2_000
    assert not core(llm).scheduler.requests


def test_abort_frees_a_long_stream(llm: LLM) -> None:
    llm_engine = llm.llm_engine
    llm_engine.add_request("endless", {"prompt_token_ids": prompt(500)}, greedy(10**7))
    for _ in range(150):
        llm_engine.step()
    assert not pool_is_empty(llm)
    llm_engine.abort_request(["endless"])
    llm_engine.step()
    assert pool_is_empty(llm)
    assert not llm_engine.has_unfinished_requests()


def test_several_outputs_of_a_request(llm: LLM) -> None:
    params = sample(100, n=3, temperature=1.0, seed=1)
    output = generate(llm, [prompt(200)], params)[0]
    texts = {tuple(completion.token_ids) for completion in output.outputs}
    assert len(texts) == 3
    assert {len(text) for text in texts} == {100}


def test_seeded_sampling_does_not_depend_on_prefill_chunks(llm: LLM) -> None:
    """Seeded requests in the middle of their prompt must not use up random numbers."""
    params = sample(50, temperature=1.0, seed=7)
    scheduler = core(llm).scheduler
    texts = []
    for chunk in (0, 37):
        assert llm.reset_prefix_cache()
        scheduler.scheduler_config.long_prefill_token_threshold = chunk
        output = generate(llm, [prompt(400)], params)[0]
        texts.append(list(output.outputs[0].token_ids))
    scheduler.scheduler_config.long_prefill_token_threshold = 0
    assert texts[0] == texts[1]


@pytest.mark.parametrize("flat", [False, True])
def test_logprobs_of_deltas_are_forgotten_once_sent(llm: LLM, flat: bool) -> None:
    """The deltas together are what a client gets at the end, from bounded memory."""
    settings = {"logprobs": 2, "flat_logprobs": flat}
    params = greedy(400, **settings)
    whole = generate(llm, [prompt(20)], params)[0].outputs[0]
    params = greedy(400, output_kind=RequestOutputKind.DELTA, **settings)
    llm.llm_engine.add_request("deltas", {"prompt_token_ids": prompt(20)}, params)
    (state,) = llm.llm_engine.output_processor.request_states.values()
    deltas, tokens = [], []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            deltas += list(output.outputs[0].logprobs)
            tokens += output.outputs[0].token_ids
        assert len(state.logprobs_processor.logprobs) < 200
    assert tokens == list(whole.token_ids)
    assert len(deltas) == 400
    for delta, expected in zip(deltas, whole.logprobs, strict=True):
        assert delta.keys() == expected.keys()
        for token, entry in delta.items():
            assert abs(entry.logprob - expected[token].logprob) < 1e-4


def test_logprobs_past_the_window(llm: LLM) -> None:
    output = generate(llm, [prompt(300)], greedy(80, logprobs=2))[0].outputs[0]
    assert output.logprobs is not None
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert entries[token].rank == 1
        assert len(entries) == 2
