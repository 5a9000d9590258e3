#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run a file of prompts of any length through vLLM with sink eviction, resumably.

Each line of the input is a JSON object with one of "prompt" (text), "prompt_token_ids"
(list of integers) or "messages" (a chat); optionally "id" (text or integer, by default
the line's number) and sampling settings ("max_tokens", "temperature", "seed", "stop",
...) that override the command line's, which override the model's own. Other keys are
ignored, with a warning.

Each finished stream is appended to the output at once, as a line of its own; a line
that cannot be run becomes {"id", "line", "error"} and the others go on. A second run
with the same output skips what is finished, by id, and tries again what failed.

    python scripts/offline_batch.py --model models/pocket \\
        --input prompts.jsonl --output out.jsonl --max-tokens 64

Files named *.parquet are Parquet, with the same keys as columns. A Parquet output is
written when the run ends, from out.parquet.jsonl, which grows as lines finish and which
a later run resumes from.

With --ray, Ray Data runs the same job on a pool of engines, each in a worker process of
a Ray cluster: the one at --ray-address (or in RAY_ADDRESS), else one of this machine
that lasts as long as the run. Run it on a machine of the cluster: input and output are
files there, while the model and this package have to be on all. With GPUs, a worker
gets as many as its engine's parallel sizes ask for, and --workers is by default what
fits; without, it is one a machine, and the cores are divided among the workers. Lines
of a worker that dies are run again by another, three times at most.

Exit status: 0 all lines finished, 1 some failed, 2 unusable arguments, 130 interrupted
(what is finished is kept).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

from tqdm import tqdm

from sink_paged.cli import merge_settings
from sink_paged.config import CONFIG_KEY, SinkConfig
from sink_paged.offline import (
    Engine,
    Output,
    RequestReader,
    Tally,
    UnusableError,
    check_sampling,
    count_lines,
    is_parquet,
    read_lines,
    records_path,
    report,
    run,
    sort_output,
    start_vllm,
    write_parquet,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint, or a model's name")
    add("--input", type=Path, required=True, help="JSON lines or Parquet to run")
    add(
        "--output",
        type=Path,
        required=True,
        help="JSON lines or Parquet written; resumed",
    )
    add("--sink-tokens", type=int, help="first tokens that stay (default 4)")
    add("--sink-window", type=int, help="recent tokens that stay (default: what fits)")
    add("--stock", action="store_true", help="vLLM without sink eviction, to compare")
    add("--max-model-len", type=int, help="resident tokens (default: trained length)")
    add("--max-tokens", type=int, default=256, help="for lines that name none (256)")
    add("--temperature", type=float)
    add("--top-p", type=float)
    add("--seed", type=int, help="of the sampling, for lines that name none")
    add("--dtype")
    add(
        "--enforce-eager",
        action="store_true",
        default=None,
        help="no torch.compile: starts sooner",
    )
    add("--batch-size", type=int, default=64, help="streams in flight (64)")
    add("--keep-order", action="store_true", help="order the output like the input")
    add("--token-ids", action="store_true", help="write the token ids of the outputs")
    add(
        "--engine-arg",
        type=engine_arg,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of vllm.LLM, e.g. block_size=32; repeatable",
    )
    add("--ray", action="store_true", help="run on a Ray cluster")
    add(
        "--ray-address", metavar="ADDRESS", help="of the cluster (default: a local one)"
    )
    add("--workers", type=int, metavar="N", help="engines (default: what fits)")
    args = parser.parse_args(argv)
    try:
        check_sampling(default_sampling(args))
        check_arguments(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def engine_arg(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is JSON where it can be read so, else text."""
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"NAME=VALUE is needed, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named arguments that are set."""
    return {n: getattr(args, n) for n in names if getattr(args, n) is not None}


def default_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling settings for lines that name none."""
    return given(args, "max_tokens", "temperature", "top_p", "seed")


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``: only what the user set, and the streams."""
    settings: dict[str, Any] = {
        "model": args.model,
        "max_num_seqs": args.batch_size,
        **given(args, "max_model_len", "dtype", "enforce_eager"),
        **dict(args.engine_arg),
    }
    if not args.stock:
        sink = given(args, "sink_tokens", "sink_window")
        if "sink_window" in sink:
            sink["window_tokens"] = sink.pop("sink_window")
        settings["additional_config"] = merge_settings(additional_config(args), sink)
    return settings


def additional_config(args: argparse.Namespace) -> Any:
    """vLLM's argument of this name, as the user gave it."""
    return dict(args.engine_arg).get("additional_config", {})


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work; raises ``ValueError`` or ``OSError``."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if not args.input.is_file():
        raise ValueError(f"--input {args.input} is not a file")
    folder = args.output.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"--output: no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output: nothing may be written into {folder}")
    if args.output.exists() and args.output.samefile(args.input):
        raise ValueError("--output is the input file")
    if is_parquet(args.output) and not find_spec("pyarrow"):
        raise ValueError(f"--output {args.output}: Parquet needs pyarrow")
    if not isinstance(config := additional_config(args), dict):
        raise ValueError(f"additional_config must be a JSON object, got {config!r}")
    if not args.stock:
        check_plugin()
        SinkConfig.from_mapping(config.get(CONFIG_KEY, {}))
        SinkConfig.from_mapping(engine_settings(args)["additional_config"][CONFIG_KEY])
    elif given(args, "sink_tokens", "sink_window"):
        raise ValueError("--stock has no sinks and no window")
    if args.ray:
        check_ray(args)
    elif given(args, "ray_address", "workers"):
        raise ValueError("--ray-address and --workers need --ray")


def check_ray(args: argparse.Namespace) -> None:
    """Refuse what does not go with ``--ray``; raises ``ValueError``."""
    gpus_per_engine(dict(args.engine_arg))
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if not all(find_spec(name) for name in ("ray", "pyarrow")):
        raise ValueError("--ray needs Ray Data (pip install 'ray[data]')")
    if dict(args.engine_arg).get("distributed_executor_backend") == "ray":
        raise ValueError(
            "with --ray each engine lies within a machine; one that vLLM spreads over "
            "several with distributed_executor_backend=ray runs without --ray"
        )


def check_plugin() -> None:
    """Refuse to run without the plugin: vLLM would silently ignore the setting."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if not entry_points(group="vllm.general_plugins", name="sink_paged"):
        raise ValueError(
            "sink_paged is not installed in this Python (pip install -e .)"
        )
    if allowed is not None and "sink_paged" not in allowed.split(","):
        raise ValueError("VLLM_PLUGINS is set and does not name sink_paged")


def stop_on_signals(stop: Event, *, at_once: bool) -> None:
    """The first Ctrl-C or TERM ends the run after this step, the next at once.

    On Ray (``at_once``) the first does too: the driver has no steps.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if at_once:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def run_lines(
    args: argparse.Namespace,
    reader: RequestReader,
    output: Output,
    tally: Tally,
    stop: Event,
) -> None:
    """Run the input's lines here or on Ray, until they end or ``stop`` is set."""
    start = partial(start_vllm, engine_settings(args), default_sampling(args))
    if not args.ray:

        def start_here() -> Engine:
            engine = start()
            tally.bar.unpause()  # the rates leave the start out
            return engine

        run(reader, start_here, output, tally, in_flight=args.batch_size, stop=stop)
        return

    from sink_paged.offline.ray_data import run_on_ray

    run_on_ray(
        args.input,
        reader,
        start,
        output,
        tally,
        in_flight=args.batch_size,
        address=args.ray_address,
        workers=args.workers,
        gpus=gpus_per_engine(dict(args.engine_arg)),
    )


def gpus_per_engine(settings: dict[str, Any]) -> int:
    """GPUs that an engine of these settings needs.

    Raises:
        ValueError: a parallel size is no positive integer.
    """
    names = ("tensor_parallel_size", "pipeline_parallel_size")
    sizes = {name: settings[name] for name in names if settings.get(name) is not None}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be an integer from 1, got {size!r}")
    return math.prod(sizes.values())


def run_file(args: argparse.Namespace, stop: Event) -> int:
    """Run the input file; returns the exit status."""
    problem: BaseException | None = None
    records = records_path(args.output)
    lines = count_lines(args.input)
    with (
        Output(records, token_ids=args.token_ids) as output,
        tqdm(total=lines, unit="line", dynamic_ncols=True, miniters=0) as bar,
    ):
        reader = RequestReader(read_lines(args.input), output.done)
        tally = Tally(bar)
        try:
            run_lines(args, reader, output, tally, stop)
        except (Exception, KeyboardInterrupt) as error:
            # An interrupt also reaches vLLM's own processes, which then fail.
            if isinstance(error, UnusableError) and not stop.is_set():
                raise
            problem = error
    if args.keep_order:
        sort_output(records, reader.line_of)
    if is_parquet(args.output):
        write_parquet(records, args.output)
    report(
        f"{'interrupted: ' if stop.is_set() else ''}{tally.finished} finished, "
        f"{tally.failed} failed, {tally.skipped} finished earlier"
    )
    if stop.is_set():
        return 130
    if problem is not None:
        report(f"error: the run broke off: {problem!r}; run again to resume")
    return 1 if problem is not None or tally.failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    stop = Event()
    stop_on_signals(stop, at_once=args.ray)
    try:
        return run_file(args, stop)
    except UnusableError as error:
        report(f"error: {error}")
        return 2
    except OSError as error:
        report(f"error: the output is not complete: {error}; run again to resume")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
