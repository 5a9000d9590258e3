# SPDX-License-Identifier: Apache-2.0
"""What sink eviction adds to a step of vLLM, at equal resident tokens.

A streaming engine and a stock one, with the same settings, decode in turns: a block of
steps of the one, then of the other, so that both meet the same noise. A step is
everything from the scheduler to the sampled tokens, the front end's share included.

- ``inside``: texts within the window, the same in both engines;
- ``past``: streams far past the window; the stock engine's texts have on average as
  many tokens as the streams keep.

Printed and written to ``--output-dir`` (``overhead.json``, after each cell, and
``overhead.png``): median step times, and median and quartiles of the ratios of
neighbouring blocks (ours over stock, below 1 is faster). ``--profile-steps`` adds, for
each cell and engine, where a step's time goes (``profile-*.txt``): Python functions by
``cProfile``, then operators and a GPU's kernels by ``torch.profiler``. Example::

    python scripts/bench_overhead.py --streams 1 8 32 --window 1024
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance, without_folders
from streams.random_llama import SHAPES, write_random_llama
from tqdm import tqdm

SINK_TOKENS = 4
SETTLING_STEPS = 8
BATCHED_TOKENS = 2048
UNTIMED_STEPS = 4
"""First steps of a block: they find the caches full of the other engine's data."""
PROFILE_ROWS = 40
Row = dict[str, Any]


def main() -> None:
    """Run all cells, print and save."""
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model in SHAPES:
            model = str(Path(scratch, "model"))
            shape = SHAPES[args.model]
            write_random_llama(Path(model), longest_text(args), args.dtype, **shape)
        rows = measure_and_save(args, model)
    print(table(rows))
    plotted = plot(rows, args.output_dir / "overhead.png")
    print(f"written: {args.output_dir / 'overhead.json'}, {plotted}")


def measure_and_save(args: argparse.Namespace, model: str) -> list[Row]:
    """The rows of all cells, each written to ``overhead.json`` once it is there.

    Raises:
        SystemExit: when an engine ends or the user interrupts; says what is saved.
    """
    path = args.output_dir / "overhead.json"
    settings = vars(args) | {"model": without_folders(args.model)}
    del settings["output_dir"]
    document = {"provenance": provenance(), "settings": settings}
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        path.write_text(json.dumps(document | {"cells": rows}, indent=1) + "\n")

    try:
        measure(args, model, keep)
    except (SystemExit, KeyboardInterrupt) as stop:
        reason = "interrupted" if isinstance(stop, KeyboardInterrupt) else str(stop)
        if not rows:
            sys.exit(f"{reason}\nno cell was measured, {path} is not written")
        print(table(rows))
        number = f"{len(rows)} of {len(cells(args))} cells"
        sys.exit(f"{reason}\n{number} were measured, written: {path}")
    return rows


def cells(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Side of the window and number of streams of what is measured."""
    return [(side, n) for n in args.streams for side in ("inside", "past")]


def measure(
    args: argparse.Namespace, model: str, keep: Callable[[Row], object]
) -> None:
    """Call ``keep`` with the row of each cell.

    Args:
        args: the settings.
        model: folder of the model.
        keep: called with side, streams and what ``compare`` returns.
    """
    steps = block_steps(args)
    names = {"ours": "ours", "stock": "stock"}
    with (
        engines(names, model, args) as connections,
        tqdm(total=len(cells(args)) * args.blocks, unit="block") as bar,
    ):
        for side, streams in cells(args):
            bar.set_description(f"{side}, {streams} streams")
            settling = settling_steps(streams, args.window)
            lengths = text_lengths(side, args.window, steps, settling)
            most = steps + 2 * settling
            for name, connection in connections.items():
                command("begin", connection, streams, lengths[name], most)
            half = args.blocks // 4 * 2  # even: who begins goes on to alternate
            times = in_turns(connections, half, args.steps, bar.update)
            if args.profile_steps:  # here, where both keep as many tokens
                for name, connection in connections.items():
                    text = command("profile", connection, args.profile_steps)
                    path = args.output_dir / f"profile-{name}-{side}-{streams}.txt"
                    path.write_text(text)
            rest = in_turns(connections, args.blocks - half, args.steps, bar.update)
            for name, connection in connections.items():
                times[name] += rest[name]
                command("end", connection)
            compared = compare(times["ours"], times["stock"])
            keep({"side": side, "streams": streams} | compared)


@contextmanager
def engines(
    names: dict[str, str], model: str, args: argparse.Namespace
) -> Iterator[dict[str, Connection]]:
    """Engines in processes of their own, by name; ``names`` says which is which.

    Args:
        names: ``ours`` or ``stock`` for the name of each.
        model: folder of the model.
        args: the settings.
    """
    context = get_context("spawn")
    connections: dict[str, Connection] = {}
    children = []
    try:
        for name, kind in names.items():
            connections[name], theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, kind, model, args))
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


def settling_steps(streams: int, window: int) -> int:
    """Steps before the first block: while the last prompts are read, others write."""
    return SETTLING_STEPS + max(streams, -(-streams * 2 * window // BATCHED_TOKENS))


def text_lengths(side: str, window: int, steps: int, settling: int) -> dict[str, int]:
    """Tokens of the prompts, so that both keep as many tokens on average."""
    if side == "inside":
        prompt = window - SINK_TOKENS - steps - settling
        return {"ours": prompt, "stock": prompt}
    return {"ours": 2 * window, "stock": window - steps // 2 - settling}


def longest_text(args: argparse.Namespace) -> int:
    """Tokens that a text of the stock engine may have."""
    settling = settling_steps(max(args.streams), args.window)
    return int(args.window + block_steps(args) + 2 * settling)


def block_steps(args: argparse.Namespace) -> int:
    """Steps of all blocks of an engine, the untimed and the profiled ones too."""
    return int(args.blocks * (UNTIMED_STEPS + args.steps) + 2 * args.profile_steps)


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


def serve(
    connection: Connection, name: str, model: str, args: argparse.Namespace
) -> None:
    """An engine, in a process of its own, that steps when it is told to."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    requests = start(name, model, args)
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


def start(name: str, model: str, args: argparse.Namespace) -> Any:
    """The engine ``ours`` or ``stock``."""
    from streams.engine import Requests
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    options: dict[str, Any] = {"max_model_len": longest_text(args)}
    if current_platform.is_cuda():
        # The pool's size is given: this only asks for free memory at the start.
        options["gpu_memory_utilization"] = 0.1
    if name == "ours":
        settings = {
            "sink_tokens": SINK_TOKENS,
            "window_tokens": args.window - SINK_TOKENS - 1,
        }
        options |= {
            "max_model_len": args.window,
            "additional_config": {"sink_paged": settings},
        }
    arguments = EngineArgs(
        model,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        max_num_seqs=max(args.streams),
        max_num_batched_tokens=BATCHED_TOKENS,
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        **options,
    )
    engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
    if current_platform.is_cuda():
        # Such steps are the host's: both engines' on the same core, as its neighbours
        # leave some cores half as fast as others. Other threads go where they like.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return Requests(engine)


def compare(ours: list[list[float]], stock: list[list[float]]) -> Row:
    """Compare blocks of steps, each ours and its neighbour of stock.

    Args:
        ours: seconds of the steps of each block.
        stock: the same of the other engine.

    Returns:
        Medians over all steps in milliseconds, and their quotient as ``pooled_ratio``;
        medians of the blocks, their ratios, and of these the median as ``ratio`` and
        the quartiles.
    """
    ours_median, stock_median = (
        statistics.median([t for block in blocks for t in block])
        for blocks in (ours, stock)
    )
    ours_blocks, stock_blocks = (
        [1e3 * statistics.median(block) for block in blocks] for blocks in (ours, stock)
    )
    ratios = [a / b for a, b in zip(ours_blocks, stock_blocks, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ours_ms": 1e3 * ours_median,
        "stock_ms": 1e3 * stock_median,
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "pooled_ratio": ours_median / stock_median,
        "ours_block_ms": ours_blocks,
        "stock_block_ms": stock_blocks,
        "block_ratios": ratios,
    }


def table(rows: list[Row]) -> str:
    """A line for each cell."""
    lines = ["text    streams  stock ms   ours ms   ratio  quartiles of blocks"]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"{row['side']:<7}{row['streams']:>8}{row['stock_ms']:>10.2f}"
            f"{row['ours_ms']:>10.2f}{row['ratio']:>8.3f}  {low:.3f} - {high:.3f}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> Path:
    """The ratio of each pair of blocks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    labels = [f"{row['side']}\n{row['streams']}" for row in rows]
    axes.boxplot([row["block_ratios"] for row in rows], tick_labels=labels)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("text, streams")
    axes.set_ylabel("step time, ours over stock")
    figure.savefig(path, dpi=150)
    return path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="random-29m", help=f"a folder or {', '.join(SHAPES)}")
    add("--streams", nargs="+", type=int, default=[1, 8, 32])
    add("--window", type=int, default=1024, help="resident tokens, sinks included")
    add("--blocks", type=int, default=12, help="blocks of steps of each engine")
    add("--steps", type=int, default=16, help="steps of a block")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--eager", action="store_true", help="without torch.compile")
    add("--profile-steps", type=int, default=0, help="steps of each profile")
    add("--kv-gib", type=float, default=3.0, help="KV cache of each engine, GiB")
    add("--output-dir", type=Path, default=Path("bench_out"))
    args = parser.parse_args()
    texts = block_steps(args) + settling_steps(max(args.streams), args.window)
    if args.window < texts + 64:
        parser.error(f"--window must be at least {texts + 64} for so many steps")
    if args.blocks < 2:
        parser.error("--blocks must be at least 2")
    return args


if __name__ == "__main__":
    main()
