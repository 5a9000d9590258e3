# SPDX-License-Identifier: Apache-2.0
"""Kills a process of a server under load, and watches how the server ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import psutil

from load.server import Server
from load.streaming import Answer, stream

BOUND = 60.0
"""Seconds in which clients must have their errors and the server must have ended."""
ENDLESS = 130_000
"""Tokens that a stream asks for; it does not live to see the end."""
FILLING = 300.0
"""Seconds that streams may take to get past the window."""
NAMED = re.compile(r"(?:ERROR|CRITICAL).*(?:died unexpectedly|EngineDeadError)")
"""What vLLM logs of a worker or an engine core that is gone."""


class FaultError(Exception):
    """Nothing could be killed under load."""


@dataclass(frozen=True)
class Outcome:
    """What became of a server and its clients after a kill.

    Attributes:
        killed: role of the process.
        streams: that were being written.
        client_errors: what their clients and later requests saw, by kind.
        answered: requests that ended as if nothing had happened.
        hanging: requests that had not ended after ``BOUND``.
        seconds_to_last_error: from the kill until every client had its error.
        seconds_to_exit: until the server had ended; None if it had not.
        exit_status: of the server.
        survivors: processes of its tree that were left.
        logged: the first line of the log that says that a process is gone.
    """

    killed: str
    streams: int
    client_errors: dict[str, int]
    answered: int
    hanging: int
    seconds_to_last_error: float
    seconds_to_exit: float | None
    exit_status: int | None
    survivors: list[str]
    logged: str | None

    def problems(self) -> list[str]:
        """What a server that fails loudly would not have done."""
        status = self.exit_status
        found = {
            f"{self.answered} requests were answered as if nothing had happened": (
                self.answered > 0
            ),
            f"{self.hanging} requests hang after {BOUND:g} s": self.hanging > 0,
            f"the server had not ended after {BOUND:g} s": status is None,
            f"processes were left: {', '.join(self.survivors)}": bool(self.survivors),
            "the log does not say that a process is gone": self.logged is None,
        }
        return [problem for problem, is_so in found.items() if is_so]

    def to_json(self) -> dict[str, Any]:
        """A mapping, with what is wrong."""
        return asdict(self) | {"problems": self.problems()}


async def kill_under_load(
    server: Server, role: str, streams: int, past: int
) -> Outcome:
    """Let streams write, kill, watch.

    Args:
        server: that answers; it will not afterwards.
        role: of the process to kill.
        streams: how many write.
        past: tokens that each has written before.

    Raises:
        FaultError: there is no such process, or a stream ended before the kill, or
            they took longer than ``FILLING``.
    """
    victims = server.processes().get(role)
    if not victims:
        raise FaultError(f"the server has no {role}: {list(server.processes())}")
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        server.url, timeout=timeout, connector=connector
    ) as http:
        answers = [Answer(number, {}) for number in range(streams)]
        writing = [
            asyncio.ensure_future(_write(http, server.model, answer))
            for answer in answers
        ]
        await _wait_until_past(server, writing, answers, past)
        victims[0].kill()
        killed = time.monotonic()
        late = asyncio.ensure_future(_write(http, server.model, Answer(streams, {})))
        done, hanging = await asyncio.wait([*writing, late], timeout=BOUND)
        last_error = time.monotonic() - killed
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
    errors = [task.exception() for task in done]
    ended = await asyncio.to_thread(_wait_for_end, server, killed + BOUND)
    await asyncio.to_thread(_wait_for_none_left, server, killed + BOUND)
    return Outcome(
        role,
        streams,
        dict(Counter(_kind(error) for error in errors if error is not None)),
        sum(error is None for error in errors),
        len(hanging),
        last_error,
        ended - killed if ended is not None else None,
        server.process.poll(),
        [_title(process) for process in server.survivors()],
        first_naming_line(server.log.read_text(errors="replace")),
    )


async def _wait_until_past(
    server: Server, writing: list[asyncio.Task[None]], answers: list[Answer], past: int
) -> None:
    deadline = time.monotonic() + FILLING
    while (fewest := min(len(answer.tokens) for answer in answers)) < past:
        for ended in (task for task in writing if task.done()):
            why = ended.exception() or "its answer is complete"
            raise FaultError(f"a stream ended too early: {why}; {server.log_tail()}")
        if time.monotonic() > deadline:
            raise FaultError(
                f"after {FILLING:g} s a stream had {fewest} tokens of {past}: "
                f"{server.log_tail()}"
            )
        await asyncio.sleep(0.1)


async def _write(http: aiohttp.ClientSession, model: str, answer: Answer) -> None:
    body = {
        "model": model,
        "prompt": f"def f{answer.session}(",
        "max_tokens": ENDLESS,
        "temperature": 0.8,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    await stream(http, "/v1/completions", body, answer, lambda tokens: None)


def _wait_for_end(server: Server, deadline: float) -> float | None:
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            return time.monotonic()
        time.sleep(0.05)
    return None


def _wait_for_none_left(server: Server, deadline: float) -> None:
    while server.survivors() and time.monotonic() < deadline:
        time.sleep(0.05)


def _title(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:100]}"
    except psutil.NoSuchProcess:
        return str(process.pid)


def _kind(error: BaseException) -> str:
    """An error without what differs from client to client."""
    text = re.sub(r"cmpl-[\w-]+|127\.0\.0\.1:\d+", "...", str(error))
    return f"{type(error).__name__}: {text[:160]}"


def first_naming_line(log: str) -> str | None:
    """The first line of a log that says that a process is gone."""
    return next((line for line in log.splitlines() if NAMED.search(line)), None)
