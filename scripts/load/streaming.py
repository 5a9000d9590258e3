# SPDX-License-Identifier: Apache-2.0
"""Streams one answer from a server, as ``vllm bench serve`` times it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

from load.events import event


@dataclass
class Answer:
    """A request that was streamed.

    Attributes:
        session: number of its session.
        params: its sampling parameters.
        timing: in the form of ``vllm bench serve``.
        prompt: its token ids, as the server read it.
        tokens: ids that were received.
        text: the same as text.
        finish_reason: none if it did not end.
        left: whether the client left before the end.
    """

    session: int
    params: dict[str, Any]
    timing: RequestFuncOutput = field(default_factory=RequestFuncOutput)
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    left: bool = False


async def stream(
    http: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any],
    answer: Answer,
    received: Callable[[int], None],
    most: int | None = None,
) -> None:
    """Stream one answer.

    Args:
        http: whose base URL is the server's.
        path: of the endpoint.
        body: of the request.
        answer: filled in while tokens arrive.
        received: called with the number of new tokens.
        most: tokens after which the client leaves.

    Raises:
        aiohttp.ClientError: the server refused or broke off.
        EventError: it sent an error in place of the rest.
    """
    timing = answer.timing
    last = timing.start_time = time.perf_counter()
    async with http.post(path, json=body) as response:
        if response.status != 200:
            reason = (await response.text())[:300]
            raise aiohttp.ClientPayloadError(f"HTTP {response.status}: {reason}")
        while line := await _next_line(response):
            if (news := event(line)) is None:
                continue
            answer.prompt = news.get("prompt_token_ids") or answer.prompt
            for choice in news["choices"]:
                answer.prompt = choice.get("prompt_token_ids") or answer.prompt
                tokens = choice.get("token_ids") or []
                if tokens:
                    now = time.perf_counter()
                    if answer.tokens:
                        timing.itl.append(now - last)
                    else:
                        timing.ttft = now - timing.start_time
                    last = now
                    answer.tokens += tokens
                    received(len(tokens))
                text = choice.get("text") or choice.get("delta", {}).get("content")
                answer.text.append(text or "")
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if most is not None and len(answer.tokens) >= most:
                answer.left = answer.finish_reason is None
                response.close()
                break
    if answer.finish_reason is None and not answer.left:
        raise aiohttp.ClientPayloadError("the stream ended without a finish reason")
    timing.latency = last - timing.start_time
    timing.output_tokens, timing.prompt_len = len(answer.tokens), len(answer.prompt)
    timing.success = answer.finish_reason is not None


async def _next_line(response: aiohttp.ClientResponse) -> bytes:
    """A line of the answer, empty at its end."""
    try:
        return await response.content.readline()
    except (ValueError, HttpProcessingError) as error:  # by the version of aiohttp
        raise aiohttp.ClientPayloadError(f"a line is too long: {error}") from error
