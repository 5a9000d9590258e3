# SPDX-License-Identifier: Apache-2.0
"""What a line of the input becomes: a request to run, and in the end an outcome."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

LineId = str | int
PromptKind = Literal["prompt", "prompt_token_ids", "messages"]


class Request(NamedTuple):
    """A line to run.

    Attributes:
        line: its number in the input, from 1.
        kind: which key of the line holds the prompt.
        prompt: text, a list of token ids, or a chat, as ``kind`` says.
        sampling: settings of ``vllm.SamplingParams`` that the line gives.
    """

    line: int
    id: LineId
    kind: PromptKind
    prompt: Any
    sampling: dict[str, Any]


class Result(NamedTuple):
    """What a finished stream gave; ``finish_reason`` is one of vLLM's."""

    request: Request
    text: str
    token_ids: list[int]
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int


class Failure(NamedTuple):
    """A line that could not be run, and why."""

    line: int
    id: LineId
    message: str


class Done(NamedTuple):
    """A line that an earlier run finished."""

    line: int
    id: LineId


Outcome = Result | Failure | Done
