# SPDX-License-Identifier: Apache-2.0
"""What a Ray actor of the pool does: one engine that runs lines as they come."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import pyarrow
import ray

from sink_paged.offline.lines import Failure, Outcome, Request, Result
from sink_paged.offline.results import UnusableError
from sink_paged.offline.runner import Engine, run_requests

RETRIES = 3
"""How often a line is begun again when its worker died."""
OF_A_MACHINE = ("VLLM_HOST_IP", "VLLM_HOST_PORT", "VLLM_PORT")
"""Environment variables of vLLM that other machines must not get."""


class EngineWorker:
    """One engine; each call runs one line and returns when that is done."""

    def __init__(
        self, start_engine: Callable[[], Engine], in_flight: int, progress: Any
    ) -> None:
        """Wait for the first line, to start the engine with.

        Args:
            start_engine: starts it.
            in_flight: streams that it runs at a time.
            progress: the actor that counts the attempts at each line.
        """
        self._start_engine = start_engine
        self._in_flight = in_flight
        self._progress = progress
        self._last_attempt = Lock()
        self._requests: SimpleQueue[Request] = SimpleQueue()
        self._unfinished: dict[int, Future[Outcome | UnusableError]] = {}
        Thread(target=self._serve, daemon=True).start()

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Run the one line in ``rows``."""
        request = pickle.loads(rows["request"][0].as_py())
        attempts = ray.get(self._progress.attempts.remote(request.line))
        outcome: Outcome | UnusableError
        if attempts > RETRIES:
            message = f"given up: {attempts} workers died while they ran this line"
            outcome = Failure(request.line, request.id, message)
        elif attempts == RETRIES:
            # A line that kills its worker takes others with it; on their last attempt
            # they go one by one, so that it is alone to reach the limit.
            with self._last_attempt:
                outcome = self._run(request)
        else:
            outcome = self._run(request)
        return pyarrow.table({"outcome": [pickle.dumps(outcome)]})

    def _run(self, request: Request) -> Outcome | UnusableError:
        ray.get(self._progress.begin.remote(request.line))
        future: Future[Outcome | UnusableError] = Future()
        self._unfinished[request.line] = future
        self._requests.put(request)
        return future.result()

    def _serve(self) -> None:
        try:
            for outcomes in run_requests(
                self._incoming(), self._start_engine, in_flight=self._in_flight
            ):
                for outcome in outcomes:
                    if isinstance(outcome, Result):  # the driver has the prompt
                        request = outcome.request._replace(prompt=None)
                        outcome = outcome._replace(request=request)
                    self._answer(line_of(outcome), outcome)
        except UnusableError as error:
            while True:
                for line in list(self._unfinished):
                    self._answer(line, error)
                self._requests.get()
        except BaseException:
            # Streams in flight are lost with the engine: Ray starts another process and
            # gives it the lines that this one owes.
            traceback.print_exc()
            os._exit(1)

    def _incoming(self) -> Iterator[Request | None]:
        while True:
            try:
                yield self._requests.get(block=not self._unfinished)
            except Empty:
                yield None

    def _answer(self, line: int, outcome: Outcome | UnusableError) -> None:
        self._unfinished.pop(line).set_result(outcome)


def line_of(outcome: Outcome) -> int:
    """Return the line that an outcome is of."""
    return outcome.request.line if isinstance(outcome, Result) else outcome.line


def environment() -> dict[str, str]:
    """Variables of the driver that a worker's engine is to see too.

    The engine runs in its worker's process: nothing of it outlives the worker, and on
    CPU it takes as many threads as the worker has cores (Ray sets OMP_NUM_THREADS),
    unbound, where vLLM's own placement would bind every engine of a node to the same.
    """
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("VLLM_", "SINK_PAGED_")) and name not in OF_A_MACHINE
    }
