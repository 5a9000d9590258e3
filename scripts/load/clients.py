# SPDX-License-Identifier: Apache-2.0
"""Concurrent clients: they stream answers, leave in the middle, retry, ask badly."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from load.bad_requests import BadRequest, is_refusal
from load.events import EventError
from load.streaming import Answer, stream
from load.workload import Session, Turn, Workload, request_body

LONGEST_LINE = 1 << 20
"""Bytes of an event: the first one carries the token ids of the prompt."""
BAD_SECONDS = 0.25
"""From one bad request to the next."""
MOST_FAILURES = 100
"""After which the clients give up."""
SILENCE = 600.0
"""Seconds without a byte after which a request counts as a failure."""


@dataclass
class Seen:
    """What all clients saw.

    Attributes:
        finished: answers that ended.
        counts: how often what happened.
        refusals: by the name of a bad request, the status codes it got.
        failures: what must not happen, in words.
        written: output tokens received, of answers that were left too.
    """

    finished: list[Answer] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    written: int = 0


class Clients:
    """So many clients at a server, until they have read so many tokens."""

    def __init__(
        self,
        url: str,
        model: str,
        workload: Workload,
        bad: list[BadRequest],
        output_tokens: int,
        report: Callable[[int], None],
    ) -> None:
        """Nothing is sent before ``run``; ``bad`` requests are sent beside the others.

        ``report`` is called with the number of new tokens.
        """
        self.url, self.model = url, model
        self.workload, self.output_tokens = workload, output_tokens
        self.seen = Seen()
        self._report = report
        self._numbers = itertools.count()
        self._bad = bad

    async def run(self, concurrency: int) -> None:
        """Until the tokens are written and the last answers have ended."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE)
        # A connection kept open may be closed by the server, which keeps idle ones for
        # five seconds, just when the next request is sent.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(
            self.url, timeout=timeout, connector=connector, read_bufsize=LONGEST_LINE
        ) as http:
            clients = (self._client(http) for _ in range(concurrency))
            await asyncio.gather(self._bad_client(http), *clients)

    @property
    def enough(self) -> bool:
        """Whether no more sessions begin."""
        failures = len(self.seen.failures)
        return self.seen.written >= self.output_tokens or failures >= MOST_FAILURES

    def _received(self, tokens: int) -> None:
        self.seen.written += tokens
        self._report(tokens)

    async def _client(self, http: aiohttp.ClientSession) -> None:
        while not self.enough:
            session = self.workload.session(next(self._numbers))
            await self._converse(http, session)

    async def _bad_client(self, http: aiohttp.ClientSession) -> None:
        """Every bad request in turn; all at least once."""
        for number, bad in enumerate(itertools.cycle(self._bad)):
            if self.enough and number >= len(self._bad):
                return
            await self._ask_badly(http, bad)
            await asyncio.sleep(BAD_SECONDS)

    async def _converse(self, http: aiohttp.ClientSession, session: Session) -> None:
        messages: list[dict[str, str]] = []
        for index, turn in enumerate(session.turns):
            if index and self.enough:
                return
            messages.append({"role": "user", "content": turn.text})
            answer = await self._ask(http, session, messages, turn)
            if answer is None:
                return
            if session.chat:
                self.seen.counts["conversations resent"] += index > 0
                messages.append({"role": "assistant", "content": "".join(answer.text)})

    async def _ask(
        self,
        http: aiohttp.ClientSession,
        session: Session,
        messages: list[dict[str, str]],
        turn: Turn,
    ) -> Answer | None:
        """One turn, with its retry; None if the client gave up."""
        path, body = request_body(self.model, session, messages, turn)
        counts = self.seen.counts
        for attempt in range(2):
            answer = Answer(session.number, turn.params)
            disconnect = turn.disconnect if attempt == 0 else None
            counts["requests"] += 1
            counts["retries"] += attempt
            try:
                await self._attempt(http, path, body, answer, disconnect)
            except (aiohttp.ClientError, EventError, TimeoutError) as error:
                counts["failed"] += 1
                self.seen.failures.append(f"session {session.number}: {error!r}")
                return None
            if not answer.left:
                counts["completed"] += 1
                if len(answer.tokens) != turn.params["max_tokens"]:
                    self.seen.failures.append(
                        f"session {session.number}: {len(answer.tokens)} tokens of "
                        f"{turn.params['max_tokens']}, {answer.finish_reason}"
                    )
                self.seen.finished.append(answer)
                return answer
            counts[f"left in {'decode' if answer.tokens else 'prefill or queue'}"] += 1
            if not turn.retry:
                return None
        return None

    async def _attempt(
        self,
        http: aiohttp.ClientSession,
        path: str,
        body: dict[str, Any],
        answer: Answer,
        disconnect: Any,
    ) -> None:
        most = disconnect.after_tokens if disconnect else None
        sending = asyncio.ensure_future(
            stream(http, path, body, answer, self._received, most)
        )
        if disconnect is None or disconnect.after_seconds is None:
            await sending
            return
        # Until the time is over or a token has come, whichever is first.
        deadline = time.perf_counter() + disconnect.after_seconds
        while not sending.done() and not answer.tokens:
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            await asyncio.wait([sending], timeout=min(0.05, left))
        if sending.done():
            await sending
            return
        sending.cancel()  # closes the connection
        await asyncio.wait([sending])
        answer.left = True

    async def _ask_badly(self, http: aiohttp.ClientSession, bad: BadRequest) -> None:
        """Send a bad request; anything but a 4xx is a failure."""
        headers = {"Content-Type": "application/json"}
        self.seen.counts["bad requests"] += 1
        try:
            async with http.post(bad.path, data=bad.body, headers=headers) as response:
                status, text = response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen.failures.append(f"bad request ({bad.name}): {error!r}")
            return
        self.seen.refusals.setdefault(bad.name, Counter())[status] += 1
        if not is_refusal(status):
            self.seen.failures.append(
                f"bad request ({bad.name}): HTTP {status}: {text[:200]}"
            )
