# SPDX-License-Identifier: Apache-2.0
"""What a client may ask of an output, where prompt and output pass the window."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import openai
import pytest

from tests.chat.api import BASE, PROMPT, WINDOW, complete, no_hits, user

OUTPUT = 5 * WINDOW // 2
NEAR = 2e-4
"""Difference of log-probabilities that rounding may make."""


def token_id(name: str) -> int:
    """Of a token that the server was asked to name by its id."""
    return int(name.removeprefix("token_id:"))


def streamed(ask: Callable[[], Iterable[Any]]) -> list[Any]:
    """Events of an answer, asked for again where the front end was late.

    vLLM then sends the deltas of several tokens as one.
    """
    for _ in range(3):
        events = list(ask())
        if len(events) > OUTPUT / 2:
            break
    return events


def test_deltas_are_the_answer(client: openai.OpenAI) -> None:
    """Of each API, token by token; the last one with the usage."""
    options: dict[str, Any] = {"model": BASE, "temperature": 0}
    ignore = {"ignore_eos": True}
    usage = {"stream": True, "stream_options": {"include_usage": True}}

    text = complete(client, max_tokens=OUTPUT).choices[0].text
    events = streamed(lambda: complete(client, max_tokens=OUTPUT, **usage))
    deltas = [choice.text for event in events for choice in event.choices]
    assert "".join(deltas) == text
    assert len(deltas) > OUTPUT / 2
    assert events[-1].usage.completion_tokens == OUTPUT
    assert events[-1].usage.prompt_tokens == len(PROMPT) + 1

    create = client.chat.completions.create
    options |= {"max_tokens": OUTPUT, "extra_body": ignore}
    text = create(messages=user(PROMPT), **options).choices[0].message.content
    events = streamed(lambda: create(messages=user(PROMPT), **options, **usage))
    parts = [choice.delta.content for event in events for choice in event.choices]
    assert "".join(part or "" for part in parts) == text
    assert len(parts) > OUTPUT / 2
    assert events[-1].usage.completion_tokens == OUTPUT

    options["max_output_tokens"] = options.pop("max_tokens")
    respond = client.responses.create
    text = respond(input=user(PROMPT), **options).output_text
    events = streamed(lambda: respond(input=user(PROMPT), stream=True, **options))
    parts = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(parts) == text
    assert len(parts) > OUTPUT / 2
    assert events[-1].response.usage.output_tokens == OUTPUT


@pytest.mark.parametrize("kept", [False, True], ids=["without", "with"])
def test_a_stop_string_of_several_tokens(client: openai.OpenAI, kept: bool) -> None:
    """It first comes beyond the window; an earlier one would end the output there."""
    sampled = {"temperature": 1.0, "seed": 11, "max_tokens": OUTPUT}
    text = complete(client, **sampled).choices[0].text
    start, stop = next(
        (i, text[i : i + 5])
        for i in range(2 * WINDOW, len(text))
        if text.find(text[i : i + 5]) == i
    )
    expected = text[: start + (len(stop) if kept else 0)]
    options: dict[str, Any] = {"stop": ["never so", stop], **sampled}
    options["include_stop_str_in_output"] = kept
    choice = complete(client, **options).choices[0]
    assert choice.text == expected
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop
    events = list(complete(client, stream=True, **options))
    assert "".join(event.choices[0].text for event in events) == expected
    assert events[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_text_read_in(client: openai.OpenAI) -> None:
    """Of an output as it is written, and of the same tokens as (echoed) prompt."""
    answer = client.chat.completions.create(
        model=BASE,
        messages=user(PROMPT),  # type: ignore[arg-type]
        max_tokens=OUTPUT,
        temperature=1.0,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    ids = [*answer.prompt_token_ids, *answer.choices[0].token_ids]  # type: ignore
    content: Any = answer.choices[0].logprobs
    assert len(content.content) == OUTPUT
    options = {"echo": True, "max_tokens": 1, "logprobs": 2, "prompt_logprobs": 2}
    read = complete(client, ids, **options, **no_hits()).choices[0]
    assert len(read.logprobs.token_logprobs) == len(ids) + 1
    scores = read.logprobs.token_logprobs[-OUTPUT - 1 : -1]
    tops = read.logprobs.top_logprobs[-OUTPUT - 1 : -1]
    ranked = read.prompt_logprobs[-OUTPUT:]
    columns = zip(content.content, scores, tops, ranked, ids[-OUTPUT:], strict=True)
    for written, score, top, entries, token in columns:
        assert abs(written.logprob - score) < NEAR
        assert abs(entries[str(token)]["logprob"] - score) < NEAR
        assert len(written.top_logprobs) == 2
        best = max(entry.logprob for entry in written.top_logprobs)
        assert abs(best - max(top.values())) < NEAR


def test_several_seeded_outputs(client: openai.OpenAI) -> None:
    """They differ, come again, and each is what a request of its own would get."""
    sampled = {"temperature": 1.0, "max_tokens": OUTPUT}

    def texts(seed: int, n: int = 3, **options: Any) -> list[str]:
        answer = complete(client, n=n, seed=seed, **sampled, **options)
        return [choice.text for choice in answer.choices]

    three = texts(7)
    assert len(set(three)) == 3
    assert min(map(len, three)) > WINDOW
    assert texts(7, **no_hits()) == three
    assert texts(8)[0] != three[0]
    assert [texts(7 + i, n=1)[0] for i in range(3)] == three
    events = complete(client, n=3, seed=7, stream=True, **sampled)
    deltas = ["", "", ""]
    for event in events:
        for choice in event.choices:
            deltas[choice.index] += choice.text
    assert deltas == three


@pytest.mark.parametrize(("frequency", "presence"), [(0.4, 0.0), (0.2, 0.8)])
def test_penalties_of_a_whole_output(
    client: openai.OpenAI, frequency: float, presence: float
) -> None:
    """Each token is the best of the model's own ranking less its penalties.

    Tokens count from the output's first on, also those that the window has left.
    """
    choice = complete(
        client,
        max_tokens=OUTPUT,
        logprobs=20,
        frequency_penalty=frequency,
        presence_penalty=presence,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    ).choices[0]

    def penalised(ranking: dict[int, float], counted: list[int]) -> dict[int, float]:
        return {
            token: score
            - frequency * counted.count(token)
            - presence * (token in counted)
            for token, score in ranking.items()
        }

    otherwise = {"none": 0, "those in the window": 0}
    ids = choice.token_ids
    for i, top in enumerate(choice.logprobs.top_logprobs):
        ranking = {token_id(name): score for name, score in top.items()}
        scores = penalised(ranking, ids[:i])
        best = max(scores.values())
        assert best > min(ranking.values()), "a token outside the ranking may be best"
        assert scores[ids[i]] > best - NEAR
        for name, counted in (
            ("none", []),
            ("those in the window", ids[max(0, i - WINDOW) : i]),
        ):
            scores = penalised(ranking, counted)
            otherwise[name] += scores[ids[i]] < max(scores.values()) - NEAR
    assert min(otherwise.values()) > 0


def test_repetition_penalty_counts_what_was_evicted(client: openai.OpenAI) -> None:
    """Tokens of the prompt that the window has left are penalised like any other."""
    options = {"max_tokens": 1, "allowed_token_ids": [ord("@"), ord("~")]}
    prompts = [text + "x = 1\n" * WINDOW for text in ("@ " * 9, "~ " * 9)]
    for penalty, expected in ((1.0, 1), (100.0, 2), (0.01, 2)):
        options["repetition_penalty"] = penalty
        chosen = [complete(client, p, **options).choices[0].text for p in prompts]
        assert len(set(chosen)) == expected, (penalty, chosen)


def test_limits_on_tokens(client: openai.OpenAI) -> None:
    """Also where they bind beyond the window only."""

    def write(**options: Any) -> str:
        return str(complete(client, max_tokens=OUTPUT, **options).choices[0].text)

    free = write()
    letters = [ord(c) for c in "xyz"]
    assert set(write(allowed_token_ids=letters)) <= set("xyz")
    assert write(logit_bias={str(ord("q")): 100}) == "q" * OUTPUT
    word = free[-6:]
    assert word not in write(bad_words=[word])
    stop = free[2]
    assert write(stop=[stop]) == free[:2].partition(stop)[0]
    assert write(min_tokens=100, stop=[stop]) == free[: free.index(stop, 99)]


def test_beam_search(client: openai.OpenAI) -> None:
    """Against a search over prompts that are read in anew."""
    width, length = 3, 24
    prompt = [256, *PROMPT.encode()]
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        grown = []
        for score, tokens in beams:
            choice = complete(
                client,
                prompt + tokens,
                max_tokens=1,
                logprobs=2 * width,
                return_tokens_as_token_ids=True,
                **no_hits(),
            ).choices[0]
            for name, value in choice.logprobs.top_logprobs[0].items():
                grown.append((score + value, [*tokens, token_id(name)]))
        beams = sorted(grown, reverse=True)[:width]
    expected = [bytes(tokens).decode() for _, tokens in beams]
    options = {"use_beam_search": True, "n": width, "max_tokens": length}
    answer = complete(client, **options)
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == width
