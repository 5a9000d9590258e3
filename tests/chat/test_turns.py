# SPDX-License-Identifier: Apache-2.0
"""Conversations resent in full at every turn, far past the context length."""

from __future__ import annotations

import openai
import pytest

from tests.chat.api import (
    APIS,
    BLOCK,
    TEXT,
    WINDOW,
    Answer,
    Ask,
    Message,
    no_hits,
    user,
)

ANSWER_TOKENS = 24
QUESTION = 100
TURNS = 14


def check_hit(answer: Answer, before: Answer | None) -> None:
    """Only what is new was computed: the rest of the last block, and what follows."""
    # The last token of an answer is sampled, but not read in.
    known = before.prompt_tokens + before.completion_tokens - 1 if before else 0
    assert known - BLOCK < answer.cached_tokens <= known


@pytest.mark.parametrize("ask", APIS.values(), ids=APIS)
def test_each_turn_computes_only_what_is_new(client: openai.OpenAI, ask: Ask) -> None:
    """And is answered as it is by a server that has never seen the conversation."""
    conversation = no_hits()
    history: list[Message] = []
    before = None
    for turn in range(TURNS):
        history += user(TEXT[turn * QUESTION : (turn + 1) * QUESTION])
        answer = ask(client, history, ANSWER_TOKENS, **conversation)
        check_hit(answer, before)
        anew = ask(client, history, ANSWER_TOKENS, **no_hits())
        assert anew.cached_tokens == 0
        assert anew.text == answer.text
        assert anew.prompt_tokens == answer.prompt_tokens
        history.append({"role": "assistant", "content": answer.text})
        before = answer
    assert before is not None
    assert before.prompt_tokens > 20 * WINDOW


def test_a_stored_conversation(client: openai.OpenAI) -> None:
    """``previous_response_id``: the server resends the history to itself."""
    conversation = no_hits()
    history: list[Message] = []
    previous = None
    for turn in range(6):
        history += user(TEXT[turn * 3 * WINDOW : (turn + 1) * 3 * WINDOW])
        stored = client.responses.create(
            model="pocket",
            input=history[-1:],  # type: ignore[arg-type]
            previous_response_id=previous,
            store=True,
            max_output_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, **conversation},
        )
        resent = APIS["response"](client, history, ANSWER_TOKENS, **no_hits())
        assert stored.output_text == resent.text
        assert stored.usage is not None
        assert stored.usage.input_tokens == resent.prompt_tokens
        cached = stored.usage.input_tokens_details.cached_tokens
        assert stored.usage.input_tokens - cached < 3 * WINDOW + 2 * BLOCK
        history.append({"role": "assistant", "content": resent.text})
        previous = stored.id
