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
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from overhead.compared import Row, compare, plot, table
from overhead.engines import command, engines, in_turns
from overhead.settings import Settings
from provenance import provenance, without_folders
from streams.random_llama import SHAPES, write_random_llama
from tqdm import tqdm


def main() -> None:
    """Run all cells, print and save."""
    model, output, settings = parse_arguments()
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model
        if model in SHAPES:
            folder = str(Path(scratch, "model"))
            shape = SHAPES[model]
            write_random_llama(
                Path(folder), settings.longest_text, settings.dtype, **shape
            )
        rows = measure_and_save(model, folder, settings, output)
    print(table(rows))
    plotted = plot(rows, output / "overhead.png")
    print(f"written: {output / 'overhead.json'}, {plotted}")


def measure_and_save(
    named: str, model: str, settings: Settings, output: Path
) -> list[Row]:
    """The rows of all cells, each written to ``overhead.json`` once it is there.

    Args:
        named: the model, as the user named it.
        model: folder of the model.
        settings: what is measured.
        output: folder of the results.

    Raises:
        SystemExit: when an engine ends or the user interrupts; says what is saved.
    """
    path = output / "overhead.json"
    about = {"model": without_folders(named)} | asdict(settings)
    document = {"provenance": provenance(), "settings": about}
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        path.write_text(json.dumps(document | {"cells": rows}, indent=1) + "\n")

    try:
        measure(model, settings, output, keep)
    except (SystemExit, KeyboardInterrupt) as stop:
        reason = "interrupted" if isinstance(stop, KeyboardInterrupt) else str(stop)
        if not rows:
            sys.exit(f"{reason}\nno cell was measured, {path} is not written")
        print(table(rows))
        number = f"{len(rows)} of {len(cells(settings))} cells"
        sys.exit(f"{reason}\n{number} were measured, written: {path}")
    return rows


def cells(settings: Settings) -> list[tuple[str, int]]:
    """Side of the window and number of streams of what is measured."""
    return [(side, n) for n in settings.streams for side in ("inside", "past")]


def measure(
    model: str, settings: Settings, output: Path, keep: Callable[[Row], object]
) -> None:
    """Call ``keep`` with the row of each cell.

    Args:
        model: folder of the model.
        settings: what is measured.
        output: folder of the profiles.
        keep: called with side, streams and what ``compare`` returns.
    """
    wanted, blocks, steps = cells(settings), settings.blocks, settings.steps
    names = {"ours": "ours", "stock": "stock"}
    with (
        engines(names, model, settings) as connections,
        tqdm(total=len(wanted) * blocks, unit="block") as bar,
    ):
        for side, streams in wanted:
            bar.set_description(f"{side}, {streams} streams")
            lengths = settings.text_lengths(side, streams)
            most = settings.block_steps + 2 * settings.settling_steps(streams)
            for name, connection in connections.items():
                command("begin", connection, streams, lengths[name], most)
            half = blocks // 4 * 2  # even: who begins goes on to alternate
            times = in_turns(connections, half, steps, bar.update)
            if settings.profile_steps:  # here, where both keep as many tokens
                for name, connection in connections.items():
                    text = command("profile", connection, settings.profile_steps)
                    (output / f"profile-{name}-{side}-{streams}.txt").write_text(text)
            rest = in_turns(connections, blocks - half, steps, bar.update)
            for name, connection in connections.items():
                times[name] += rest[name]
                command("end", connection)
            compared = compare(times["ours"], times["stock"])
            keep({"side": side, "streams": streams} | compared)


def parse_arguments() -> tuple[str, Path, Settings]:
    """Read the command line: the model, the output folder, the rest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="random-29m", help=f"a folder or {', '.join(SHAPES)}")
    add("--streams", nargs="+", type=int, default=[1, 8, 32])
    add("--window", type=int, default=1024, help="resident tokens, sinks included")
    add("--blocks", type=int, default=12, help="blocks of steps of each engine")
    add("--steps", type=int, default=16, help="steps of a block")
    add("--dtype", default=Settings.dtype, choices=["float32", "bfloat16", "float16"])
    add("--eager", action="store_true", help="without torch.compile")
    add("--profile-steps", type=int, default=0, help="steps of each profile")
    add("--kv-gib", type=float, default=Settings.kv_gib, help="of each KV cache, GiB")
    add("--output-dir", type=Path, default=Path("bench_out"))
    args = vars(parser.parse_args())
    model, output = args.pop("model"), args.pop("output_dir")
    settings = Settings(**args | {"streams": tuple(args["streams"])})
    needed = settings.block_steps + settings.settling_steps(max(settings.streams)) + 64
    if settings.window < needed:
        parser.error(f"--window must be at least {needed} for so many steps")
    if settings.blocks < 2:
        parser.error("--blocks must be at least 2")
    return model, output, settings


if __name__ == "__main__":
    main()
