# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own that step in turns, so that noise falls on all."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from overhead.settings import (
    BATCHED_TOKENS,
    SETTLING_STEPS,
    SINK_TOKENS,
    UNTIMED_STEPS,
    Settings,
)

PROFILE_ROWS = 40


@contextmanager
def engines(
    names: dict[str, str], model: str, settings: Settings
) -> Iterator[dict[str, Connection]]:
    """Engines in processes of their own, by name; ``names`` says which is which.

    Args:
        names: ``ours`` or ``stock`` for the name of each.
        model: folder of the model.
        settings: of all of them.
    """
    context = get_context("spawn")
    connections: dict[str, Connection] = {}
    children = []
    try:
        for name, kind in names.items():
            connections[name], theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, kind, model, settings))
            child.start()
            theirs.close()
            children.append(child)
        for name, connection in connections.items():
            try:
                connection.recv()  # started
            except EOFError:
                message = f"the {name} engine did not start; see above"
                raise SystemExit(message) from None
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for child in children:
            child.join()


def in_turns(
    connections: dict[str, Connection],
    blocks: int,
    steps: int,
    after_block: Callable[[], object] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Seconds of the steps of each block, by engine; who begins alternates."""
    times: dict[str, list[list[float]]] = {name: [] for name in connections}
    for block in range(blocks):
        order = list(connections) if block % 2 else list(connections)[::-1]
        for name in order:
            times[name].append(command("run", connections[name], steps))
        after_block()
    return times


def command(verb: str, connection: Connection, *arguments: int) -> Any:
    """Ask an engine's process for something and wait until it is done.

    Raises:
        SystemExit: when the process ended.
    """
    try:
        connection.send((verb, *arguments))
        return connection.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"an engine ended (asked to {verb}); see above") from None


def serve(connection: Connection, name: str, model: str, settings: Settings) -> None:
    """An engine, in a process of its own, that steps when it is told to."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    requests = start(name, model, settings)
    connection.send("started")
    rng = np.random.default_rng(0)
    vocabulary = requests.engine.model_config.get_vocab_size()
    while True:
        try:
            verb, *arguments = connection.recv()
        except EOFError:
            return
        answer: list[float] | str = []
        if verb == "begin":
            streams, prompt_tokens, max_tokens = arguments
            for stream in range(streams):
                prompt = rng.integers(vocabulary, size=prompt_tokens).tolist()
                requests.add(f"{stream}", prompt, max_tokens)
            writing: set[str] = set()
            while len(writing) < streams:
                writing |= {delta.name for delta in requests.step() if delta.tokens}
            for _ in range(SETTLING_STEPS):
                list(requests.step())
        elif verb == "run":
            for step in range(UNTIMED_STEPS + arguments[0]):
                begun = time.perf_counter()
                deltas = list(requests.step())
                if step >= UNTIMED_STEPS:
                    answer.append(time.perf_counter() - begun)
                assert len(deltas) == streams, "all streams write in a timed step"
        elif verb == "profile":
            answer = profiles(requests, arguments[0])
        else:
            names = list(requests.engine.output_processor.request_states)
            requests.engine.abort_request(names, internal=True)
            while requests.busy:
                list(requests.step())
        connection.send(answer)


def profiles(requests: Any, steps: int) -> str:
    """Where the time of ``steps`` steps goes, once by each profiler, as tables."""
    import torch

    functions = cProfile.Profile()
    with functions:
        for _ in range(steps):
            list(requests.step())
    with torch.profiler.profile() as operators:  # of all devices
        for _ in range(steps):
            list(requests.step())
    written = io.StringIO(f"{steps} steps\n")
    written.seek(0, io.SEEK_END)
    table = pstats.Stats(functions, stream=written)
    for order in ("tottime", "cumulative"):
        table.sort_stats(order).print_stats(PROFILE_ROWS)
    averages = operators.key_averages()
    orders = ["self_cpu_time_total"]
    if torch.cuda.is_available():
        orders.append("self_cuda_time_total")
    for order in orders:
        written.write(averages.table(sort_by=order, row_limit=PROFILE_ROWS))
    return written.getvalue()


def start(name: str, model: str, settings: Settings) -> Any:
    """The engine ``ours`` or ``stock``."""
    from streams.engine import Requests
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    options: dict[str, Any] = {"max_model_len": settings.longest_text}
    if current_platform.is_cuda():
        # The pool's size is given: this only asks for free memory at the start.
        options["gpu_memory_utilization"] = 0.1
    if name == "ours":
        sink_paged = {
            "sink_tokens": SINK_TOKENS,
            "window_tokens": settings.window - SINK_TOKENS - 1,
        }
        options |= {
            "max_model_len": settings.window,
            "additional_config": {"sink_paged": sink_paged},
        }
    arguments = EngineArgs(
        model,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        enforce_eager=settings.eager,
        enable_prefix_caching=False,
        max_num_seqs=max(settings.streams),
        max_num_batched_tokens=BATCHED_TOKENS,
        kv_cache_memory_bytes=int(settings.kv_gib * 2**30),
        **options,
    )
    engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
    if current_platform.is_cuda():
        # Such steps are the host's: both engines' on the same core, as its neighbours
        # leave some cores half as fast as others. Other threads go where they like.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return Requests(engine)
