# SPDX-License-Identifier: Apache-2.0
"""The loop that keeps an engine busy with a bounded number of streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Event
from typing import Any, Protocol

from sink_paged.offline.lines import Done, Failure, Outcome, Request, Result
from sink_paged.offline.progress import Tally, report
from sink_paged.offline.results import Output, UnusableError


class RefusedError(Exception):
    """The engine does not take this request; it goes on with the others."""


class Engine(Protocol):
    """What a run needs of vLLM."""

    @property
    def in_flight(self) -> int:
        """Streams that were submitted and have not finished."""

    def submit(self, request: Request) -> None:
        """Queue a request; raises ``RefusedError``."""

    def step(self) -> list[Result]:
        """Advance all streams in flight, return those that finished."""


def run_requests(
    lines: Iterable[Request | Failure | Done | None],
    start_engine: Callable[[], Engine],
    *,
    in_flight: int,
) -> Iterator[list[Outcome]]:
    """Run parsed lines on one engine, ``in_flight`` streams at a time.

    ``lines`` is read on only while a place is free, so that no more than ``in_flight``
    prompts are ever held; None among them says that the next is not there yet, and the
    streams in flight advance. What needs no engine passes through, and the engine is
    asked for with the first request: a run that has nothing to do is quick.

    Yields:
        The outcomes that each line read and each step of the engine brought, often
        none: the caller regains control often enough to show progress, or to stop.
        Streams in flight then stay in the engine.
    """
    engine: Engine | None = None
    unread = iter(lines)
    ended = False
    while True:
        while engine is None or engine.in_flight < in_flight:
            try:
                line = next(unread)
            except StopIteration:
                ended = True
                break
            if line is None:
                break
            if isinstance(line, Request):
                if engine is None:
                    engine = start_engine()
                yield _submit(engine, line)
            else:
                yield [line]
        if engine is not None and engine.in_flight:
            yield [_judge(result) for result in engine.step()]
        elif ended:
            return


def _submit(engine: Engine, request: Request) -> list[Outcome]:
    try:
        engine.submit(request)
    except RefusedError as error:
        return [Failure(request.line, request.id, str(error))]
    return []


def _judge(result: Result) -> Result | Failure:
    """A stream that the engine gave up counts as failed."""
    if result.finish_reason not in ("error", "abort"):
        return result
    message = f"the engine gave this request up ({result.finish_reason})"
    return Failure(result.request.line, result.request.id, message)


def run(
    lines: Iterable[Request | Failure | Done],
    start_engine: Callable[[], Engine],
    output: Output,
    tally: Tally,
    *,
    in_flight: int,
    stop: Event | None = None,
) -> None:
    """Run parsed lines into the output file, until they end or ``stop`` is set."""
    for outcomes in run_requests(lines, start_engine, in_flight=in_flight):
        for outcome in outcomes:
            record(outcome, output, tally)
        tally.show()
        if stop is not None and stop.is_set():
            return


def record(outcome: Outcome, output: Output, tally: Tally) -> None:
    """Write one outcome where it is new, and count it."""
    if isinstance(outcome, Failure):
        report(f"line {outcome.line}: {outcome.message}")
    if not isinstance(outcome, Done):
        output.write(outcome)
    tally.count(outcome)


def start_vllm(
    settings: dict[str, Any], sampling: dict[str, Any], share: int = 1
) -> Engine:
    """Start vLLM; whatever prevents that is a matter of the arguments.

    Args:
        settings: keyword arguments of ``vllm.LLM``.
        sampling: settings of ``vllm.SamplingParams`` for all requests.
        share: engines that share this machine.

    Raises:
        UnusableError: vLLM did not start.
    """
    try:
        from sink_paged.offline.engine import VllmEngine

        return VllmEngine(settings, sampling, share=share)
    except Exception as error:
        raise UnusableError(f"vLLM did not start: {error}") from error
