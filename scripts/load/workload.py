# SPDX-License-Identifier: Apache-2.0
"""What clients ask for: a sequence of sessions, drawn from a seed.

A session is one completion, or a conversation whose every turn resends what was said
before. Session number ``i`` is the same in every run; when it starts, and whether its
neighbours share its steps, is up to the load.
"""

from __future__ import annotations

import argparse as stdlib_argparse
import inspect
import random
import tarfile
import typing
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

SHARED_BEGINNINGS = 8
"""Prompts that begin at one of these places of the text share blocks of the cache."""
TURNS = (2, 4)
CONVERSATION_SHARE = 0.15
SEEDED_SHARE = 0.35
PENALTY_SHARE = 0.2
LOGPROBS_SHARE = 0.1
DISCONNECT_SHARE = 0.25
RETRY_SHARE = 0.6
LONGEST_WAIT = 4.0
"""Seconds after which a client leaves at the latest that does so in prefill."""


@dataclass(frozen=True)
class Disconnect:
    """When a client leaves.

    Attributes:
        after_seconds: that it waits for the first token, or
        after_tokens: that it reads.
    """

    after_seconds: float | None = None
    after_tokens: int | None = None


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    Attributes:
        text: the prompt, or what the user says in a conversation.
        params: sampling parameters, in the API's names.
        disconnect: when the client leaves, if it does.
        retry: whether it then sends the same request again.
    """

    text: str
    params: dict[str, Any]
    disconnect: Disconnect | None
    retry: bool


@dataclass(frozen=True)
class Session:
    """Requests that a client sends one after the other.

    Attributes:
        number: in the sequence.
        chat: whether it is a conversation.
        turns: its requests; one unless ``chat``.
    """

    number: int
    chat: bool
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Workload:
    """Draws sessions.

    Attributes:
        seed: of the sequence.
        resident: tokens that a stream keeps; lengths are in multiples of it.
        prompt_windows: shortest and longest prompt.
        output_windows: shortest and longest output.
    """

    seed: int
    resident: int
    prompt_windows: tuple[float, float] = (0.125, 8.0)
    output_windows: tuple[float, float] = (0.5, 10.0)

    def session(self, number: int) -> Session:
        """The session of this number."""
        rng = random.Random(f"{self.seed}-{number}")
        chat = rng.random() < CONVERSATION_SHARE
        turns = rng.randint(*TURNS) if chat else 1
        return Session(
            number,
            chat,
            tuple(self._turn(rng, number, short=turn > 0) for turn in range(turns)),
        )

    def _turn(self, rng: random.Random, number: int, short: bool) -> Turn:
        """A turn; ``short`` ones of a conversation add little to what was said."""
        longest = 1.0 if short else self.prompt_windows[1]
        prompt = self._length(rng, (self.prompt_windows[0], longest))
        output = self._length(rng, self.output_windows)
        text = source_text()
        if rng.random() < 0.5:
            place = len(text) // SHARED_BEGINNINGS * rng.randrange(SHARED_BEGINNINGS)
        else:
            place = rng.randrange(len(text))
        place = min(place, len(text) - prompt)
        disconnect = None
        if rng.random() < DISCONNECT_SHARE:
            if rng.random() < 0.5:
                seconds = rng.uniform(0, LONGEST_WAIT)
                disconnect = Disconnect(after_seconds=seconds)
            else:
                disconnect = Disconnect(after_tokens=rng.randrange(1, output))
        return Turn(
            text[place : place + prompt],
            self._params(rng, number) | {"max_tokens": output},
            disconnect,
            retry=rng.random() < RETRY_SHARE,
        )

    def _length(self, rng: random.Random, windows: tuple[float, float]) -> int:
        """Log-uniform between two numbers of windows."""
        low, high = (log(self.resident * w) for w in windows)
        return max(2, round(exp(rng.uniform(low, high))))

    def _params(self, rng: random.Random, number: int) -> dict[str, Any]:
        params: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        if rng.random() < SEEDED_SHARE:
            params |= {"temperature": 0.8, "seed": number}
        if rng.random() < PENALTY_SHARE:
            params |= {"repetition_penalty": 1.1, "frequency_penalty": 0.1}
        if rng.random() < LOGPROBS_SHARE:
            params |= {"logprobs": 2}
        return params


def source_text() -> str:
    """A few hundred kilobytes of ASCII: source files of Python's standard library."""
    global _text
    if not _text:
        modules = (inspect, tarfile, typing, stdlib_argparse)
        files = [Path(module.__file__ or "").read_text() for module in modules]
        _text = "".join(files).encode("ascii", "ignore").decode()
    return _text


_text = ""


def request_body(
    model: str, session: Session, messages: list[dict[str, str]], turn: Turn
) -> tuple[str, dict[str, Any]]:
    """Path and body of a streamed request.

    Args:
        model: its name.
        session: which the turn belongs to.
        messages: a conversation up to and with the turn; unused otherwise.
        turn: what is asked.
    """
    params = dict(turn.params)
    body = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if not session.chat:
        return "/v1/completions", body | params | {"prompt": turn.text}
    if "logprobs" in params:
        params |= {"logprobs": True, "top_logprobs": params["logprobs"]}
    return "/v1/chat/completions", body | params | {"messages": messages}
