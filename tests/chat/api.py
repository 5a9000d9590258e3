# SPDX-License-Identifier: Apache-2.0
"""The same conversation through each of the OpenAI APIs."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import openai

BASE, ADAPTER = "pocket", "adapter"
WINDOW = 64
"""The server's ``--max-model-len``: the most tokens that are resident."""
BLOCK = 16
TEXT = Path(tarfile.__file__).read_text(encoding="ascii", errors="ignore")
"""Nothing that the model was trained on."""
PROMPT = TEXT[: 16 * WINDOW]
Message = dict[str, Any]

_salts = map(str, itertools.count())


def no_hits() -> dict[str, str]:
    """Fields of a request that finds nothing in the prefix cache."""
    return {"cache_salt": next(_salts)}


class Answer(NamedTuple):
    """What the tests look at in a response."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def user(text: str) -> list[Message]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def chat(
    client: openai.OpenAI, messages: list[Message], max_tokens: int | None, **extra: Any
) -> Answer:
    """A greedy answer by ``/v1/chat/completions``."""
    response = client.chat.completions.create(
        model=BASE,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, **extra},
    )
    usage: Any = response.usage
    return Answer(
        response.choices[0].message.content or "",
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens_details.cached_tokens,
    )


def complete(
    client: openai.OpenAI, prompt: str | list[int] = PROMPT, **options: Any
) -> Any:
    """What ``/v1/completions`` makes of it; greedy and endless unless said."""
    own = (
        "model",
        "max_tokens",
        "temperature",
        "seed",
        "n",
        "stop",
        "stream",
        "logprobs",
    )
    own += ("stream_options", "echo", "frequency_penalty", "presence_penalty")
    extra = {name: options.pop(name) for name in set(options) - set(own)}
    return client.completions.create(
        prompt=prompt,
        extra_body={"ignore_eos": True, **extra},
        **{"model": BASE, "temperature": 0, **options},
    )


def completion(
    client: openai.OpenAI, messages: list[Message], max_tokens: int | None, **extra: Any
) -> Answer:
    """A greedy answer by ``/v1/completions``, the conversation written out."""
    prompt = "".join(f"{message['content']}\n" for message in messages)
    response = complete(client, prompt, max_tokens=max_tokens, **extra)
    usage: Any = response.usage
    return Answer(
        response.choices[0].text,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens_details.cached_tokens,
    )


def response(
    client: openai.OpenAI, messages: list[Message], max_tokens: int | None, **extra: Any
) -> Answer:
    """A greedy answer by ``/v1/responses``."""
    response = client.responses.create(
        model=BASE,
        input=messages,  # type: ignore[arg-type]
        max_output_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, **extra},
    )
    usage: Any = response.usage
    return Answer(
        response.output_text,
        usage.input_tokens,
        usage.output_tokens,
        usage.input_tokens_details.cached_tokens,
    )


Ask = Callable[..., Answer]
APIS: dict[str, Ask] = {"chat": chat, "completion": completion, "response": response}
