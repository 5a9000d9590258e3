# SPDX-License-Identifier: Apache-2.0
"""Other ways to ask, each against the same text asked for plainly."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.chat.api import (
    APIS,
    BASE,
    BLOCK,
    PROMPT,
    WINDOW,
    chat,
    complete,
    no_hits,
    user,
)

TOKENS = WINDOW
IDS = [256, *PROMPT.encode()]


def post(server: str, path: str, **fields: Any) -> Any:
    """The JSON of an answer."""
    answer = httpx.post(f"{server}{path}", json={"model": BASE, **fields}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def plain(client: openai.OpenAI) -> str:
    """What the model answers to ``PROMPT``."""
    return chat(client, user(PROMPT), TOKENS).text


def test_truncated_prompts(client: openai.OpenAI) -> None:
    """To a length past the window, from either side; -1 keeps the longest text: all."""
    length = 8 * WINDOW
    for side, kept in (("left", IDS[-length:]), ("right", IDS[:length])):
        cut = complete(
            client,
            max_tokens=TOKENS,
            truncate_prompt_tokens=length,
            truncation_side=side,
        )
        assert cut.usage.prompt_tokens == length
        whole = complete(client, kept, max_tokens=TOKENS, **no_hits())
        assert cut.choices[0].text == whole.choices[0].text
    full = complete(client, max_tokens=1, truncate_prompt_tokens=-1)
    assert full.usage.prompt_tokens == len(IDS)


def test_a_message_is_continued(client: openai.OpenAI, plain: str) -> None:
    half = len(plain) // 2
    begun = [*user(PROMPT), {"role": "assistant", "content": plain[:half]}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    rest = chat(client, begun, TOKENS - half, **options)
    assert rest.text == plain[half:]


def test_a_batch_of_chats(server: str, client: openai.OpenAI, plain: str) -> None:
    other = PROMPT[::-1]
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    conversations = [user(PROMPT), user(other)]
    answer = post(
        server, "/v1/chat/completions/batch", messages=conversations, **options
    )
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [plain, chat(client, user(other), TOKENS).text]


def test_anthropic_messages(server: str, client: openai.OpenAI) -> None:
    """Without ``ignore_eos``, which that API lacks; usage tells the cached tokens."""
    expected = chat(client, user(PROMPT), TOKENS, ignore_eos=False)
    options = {"max_tokens": TOKENS, "temperature": 0}
    answer = post(server, "/v1/messages", messages=user(PROMPT), **options)
    (part,) = answer["content"]
    assert part["text"] == expected.text
    assert answer["usage"]["output_tokens"] == expected.completion_tokens
    cached = answer["usage"]["cache_read_input_tokens"]
    assert cached > len(PROMPT) - BLOCK
    assert answer["usage"]["input_tokens"] + cached == expected.prompt_tokens
    counted = post(server, "/v1/messages/count_tokens", messages=user(PROMPT))
    assert counted["input_tokens"] == expected.prompt_tokens


def test_tokens_in_and_out(server: str, client: openai.OpenAI) -> None:
    """The endpoints of ``--enable-scale-out``, and the tokenizer's."""
    expected = complete(client, max_tokens=TOKENS, return_token_ids=True).choices[0]
    sampling = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    rendered = post(server, "/v1/completions/render", prompt=PROMPT, **sampling)
    assert rendered[0]["token_ids"] == IDS
    answer = post(
        server, "/inference/v1/generate", token_ids=IDS, sampling_params=sampling
    )
    assert answer["choices"][0]["token_ids"] == expected.token_ids
    assert post(server, "/tokenize", prompt=PROMPT)["tokens"] == IDS
    assert post(server, "/detokenize", tokens=IDS[1:])["prompt"] == PROMPT


@pytest.mark.parametrize("length", [9, 3 * WINDOW])
def test_no_request_is_endless(server: str, client: openai.OpenAI, length: int) -> None:
    """One that names no ``max_tokens`` gets what a server of the window would give."""
    text = "a" * length
    chats = chat(client, user(text), None)
    left = WINDOW - chats.prompt_tokens
    assert chats.completion_tokens == (left if left > 0 else WINDOW - 1)
    responses = APIS["response"](client, user(text), None)
    left = WINDOW - responses.prompt_tokens
    assert responses.completion_tokens == (left if left > 0 else WINDOW - 1)
    path, options = "/v1/chat/completions", {"ignore_eos": True, "temperature": 0}
    batch = post(server, f"{path}/batch", messages=[user(text)], **options)
    assert batch["usage"]["completion_tokens"] == chats.completion_tokens
    beams = post(server, path, messages=user(text), use_beam_search=True, **options)
    assert beams["usage"]["completion_tokens"] == chats.completion_tokens
