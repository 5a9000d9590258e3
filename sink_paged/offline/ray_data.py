# SPDX-License-Identifier: Apache-2.0
"""A file of requests on a Ray cluster: Ray Data feeds a pool of engines.

The driver reads the input once, settles the lines that need no engine, and is the only
one to write. A row of the dataset, and a task, is one line: it is written as soon as it
is finished, and if its worker dies before, Ray gives it to another.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import pyarrow
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sink_paged.offline.files import read_lines
from sink_paged.offline.lines import Request
from sink_paged.offline.progress import Tally
from sink_paged.offline.ray_slots import Slots, plan
from sink_paged.offline.ray_worker import EngineWorker, environment, line_of
from sink_paged.offline.requests import RequestReader, parse_line
from sink_paged.offline.results import Output, UnusableError
from sink_paged.offline.runner import Engine, record

OBJECT_STORE_BYTES = 1 << 30
"""Of a local cluster: prompts and outputs in flight; Ray spills what exceeds it."""


class LineSource(ray.data.Datasource):
    """The lines to run, one to a block, read on the driver's machine.

    Ray Data bounds its queues by bytes, and a short prompt is far fewer bytes than what
    Ray keeps to know of it; so the reader waits while too many lines are unfinished.
    """

    def __init__(
        self, path: Path, wanted: bytearray, progress: Any, unfinished: int
    ) -> None:
        """Read ``path``.

        Args:
            path: the input.
            wanted: for each line, whether it is to be run.
            progress: the ``Progress`` that counts the finished lines.
            unfinished: how many lines may be read that are not finished.
        """
        super().__init__()
        self._path, self._wanted = path, wanted
        self._progress, self._unfinished = progress, unfinished

    @property
    def supports_distributed_reads(self) -> bool:
        """The input is a file of the driver's machine."""
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known without reading."""
        return None

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ray.data.ReadTask]:
        """Return the one task that reads all."""
        metadata = BlockMetadata(
            num_rows=sum(self._wanted),
            size_bytes=None,
            exec_stats=None,
            input_files=None,
        )
        return [ray.data.ReadTask(self._read, metadata)]

    def _read(self) -> Iterator[pyarrow.Table]:
        numbered = enumerate(read_lines(self._path), 1)
        for read, (line, raw) in enumerate(compress(numbered, self._wanted), 1):
            if read > self._unfinished:
                ray.get(self._progress.wait_for.remote(read - self._unfinished))
            request = pickle.dumps(parse_line(line, raw))
            yield pyarrow.table({"request": [request]})


class Progress:
    """An actor that the reader and the workers ask about the run."""

    def __init__(self) -> None:
        """Count from zero."""
        self._finished = 0
        self._attempts: Counter[int] = Counter()
        self._changed = asyncio.Condition()

    async def attempts(self, line: int) -> int:
        """Return how often a line was begun."""
        return self._attempts[line]

    async def begin(self, line: int) -> None:
        """Count an attempt at a line."""
        self._attempts[line] += 1

    async def finish(self, line: int) -> None:
        """Count a finished line."""
        async with self._changed:
            self._finished += 1
            del self._attempts[line]
            self._changed.notify_all()

    async def wait_for(self, finished: int) -> None:
        """Return once so many lines are finished."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._finished >= finished)


def run_on_ray(
    path: Path,
    reader: RequestReader,
    start_engine: Callable[[int], Engine],
    output: Output,
    tally: Tally,
    *,
    in_flight: int,
    address: str | None = None,
    workers: int | None = None,
    gpus: int = 1,
) -> None:
    """Run the input file into the output file on a pool of engines.

    Args:
        path: the input.
        reader: reads the same input.
        start_engine: starts an engine in a worker; is told how many share a node.
        output: where the outcomes go, as they come.
        tally: counts them.
        in_flight: streams that each engine runs at a time.
        address: the cluster; None is ``RAY_ADDRESS``, or else a local one.
        workers: engines, by default as many as fit.
        gpus: GPUs that an engine needs, on a cluster that has any.

    Raises:
        UnusableError: no cluster, no place for an engine, or one that does not start.
    """
    wanted = bytearray()
    for item in reader:
        wanted.extend(bytes(item.line - 1 - len(wanted)))
        wanted.append(isinstance(item, Request))
        if not isinstance(item, Request):
            record(item, output, tally)
    tally.show()
    if not any(wanted):
        return
    with cluster(address):
        slots = plan([node["Resources"] for node in _nodes()], workers, gpus)
        progress = _on_this_node(Progress).remote()
        # Ray Data sends workers twice what they run at a time; the third is in reserve.
        source = LineSource(path, wanted, progress, 3 * slots.workers * in_flight)
        worker = partial(start_engine, slots.per_node), in_flight, progress
        rows = _dataset(source, worker, slots, in_flight)
        for block in rows.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for pickled in block["outcome"].to_pylist():
                outcome = pickle.loads(pickled)
                if isinstance(outcome, UnusableError):
                    raise outcome
                record(outcome, output, tally)
                progress.finish.remote(line_of(outcome))
            tally.show()


def _on_this_node(kind: type) -> Any:
    """An actor's class whose actors outlive every node but the driver's."""
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind)


def _dataset(
    source: LineSource, worker: tuple[Any, ...], slots: Slots, in_flight: int
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the tally's bar counts lines
    context.issue_detectors_config.detectors = []  # which take a long stream for a hang
    # One line to a block and so to a task: outcomes come one by one, and what a dead
    # worker owes is known by line.
    context.target_max_block_size = 1
    # Blocks of a task that are fetched per turn of Ray Data's loop, about ten a second.
    context._max_num_blocks_in_streaming_gen_buffer = in_flight
    return ray.data.read_datasource(
        source, override_num_blocks=1, num_cpus=0
    ).map_batches(
        EngineWorker,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=worker,
        compute=ray.data.ActorPoolStrategy(
            size=slots.workers,
            max_concurrent_calls_per_actor=in_flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=slots.cpus,
        num_gpus=slots.gpus,
        runtime_env={"env_vars": environment()},
    )


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join a Ray cluster, or start one; one that the caller has joined stays so.

    Raises:
        UnusableError: there is none, or it does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            ray.init(address)
        else:
            _start_cluster()
    except Exception as error:  # of many kinds, bare ones too
        raise UnusableError(f"no Ray cluster: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_cluster() -> None:
    """Start one; on a busy machine Ray's own limit of 15 seconds may be too short."""
    for last in (False, False, True):
        try:
            ray.init(
                "local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES
            )
            return
        except Exception:
            ray.shutdown()
            if last:
                raise


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]
