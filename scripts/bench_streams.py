# SPDX-License-Identifier: Apache-2.0
r"""Throughput over concurrent streams that are longer than the window.

Peers, each in a process of its own for every measurement, interleaved:

- ``sink_paged``: vLLM with sink eviction, cache config ``S+R`` (``--window`` is S + R);
- ``vllm``: stock vLLM with full attention, as far as its context and KV pool reach;
- ``recompute``: the paper's baseline, every token from the last ``--window`` tokens
  anew, on stock vLLM (prefix caching off, prompts of all streams share steps);
- ``hf``: a plain Hugging Face loop of StreamingLLM, a batch of streams, Llama only;
- ``openvino``, ``openvino_full``: OpenVINO GenAI's continuous batching with its cache
  eviction and with full attention, in a Python environment of its own.

Streams begin at once with random prompts and write until their texts are
``--length-windows`` windows long. ``recompute`` and ``hf``, whose tokens cost the same
at any length past the window, stop ``--seconds`` after every stream's first token. Of a
run that was cut so the throughput is an estimate for whole texts (``cut`` in the table,
``extrapolated`` in the JSON): the time to the first tokens as it was, the rest at the
rate while all streams wrote. Over what it did write (``measured_output_throughput``)
its prompts would weigh more than those of peers that wrote to the end.

Without ``--kv-windows`` each engine has the KV pool that its streams need; with it all
have a pool of so many windows, and streams wait or are preempted. Each engine is warmed
up before the clock starts.

Figures: output tokens a second over whole texts (prefill included) and while all
streams write; speed-ups over ``recompute`` and ``hf`` by both; time from token to
token; time to the first token, queueing included; preemptions; KV blocks in use at
most; peak resident memory of all processes of the engine. Written to ``--output-dir``:
``streams.json`` (key names of ``vllm bench serve``; what was skipped or failed under
``problems``), three plots, and a log of each measurement.

Examples::

    python scripts/bench_streams.py --quick
    python scripts/bench_streams.py --kv-windows 8 --concurrency 64 --length-windows 8 \
        --peers sink_paged vllm
    python scripts/bench_streams.py --model meta-llama/Llama-3.1-8B --dtype bfloat16 \
        --window 4096 --kv-windows 64 --concurrency 16 64 256

OpenVINO GenAI needs an environment of its own::

    python3 -m venv openvino-venv
    openvino-venv/bin/pip install openvino-genai optimum-intel psutil
    python scripts/bench_streams.py --peers sink_paged vllm openvino openvino_full \
        --openvino-python openvino-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, without_folders
from streams.launch import SETTINGS, engine_environment, measure
from streams.outcomes import Outcomes
from streams.plan import check, text_tokens, workloads
from streams.plots import plot_all
from streams.random_llama import SHAPES, write_random_llama
from streams.summary import speedup_lines, summarise, table
from streams.workload import Workload
from tqdm import tqdm

PEERS = ("sink_paged", "vllm", "recompute", "hf", "openvino", "openvino_full")
QUICK: dict[str, Any] = {
    "concurrency": [8],
    "window": [256],
    "length_windows": 3.0,
    "repetitions": 1,
    "seconds": 6.0,
    "eager": True,
}
"""Eager, as vLLM's CPU build compiles at every start: about half a minute a peer."""


def main() -> None:
    """Run and print."""
    args = parse_arguments()
    # As after Ctrl-C: the engine that runs is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "logs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model in SHAPES:
            longest = max(text_tokens(args, window) for window in args.window)
            model = str(Path(scratch, "model"))
            write_random_llama(Path(model), longest, args.dtype, **SHAPES[args.model])
        run(args, model, scratch)


def run(args: argparse.Namespace, model: str, scratch: str) -> None:
    """Measure; ``streams.json`` is brought up to date after each outcome."""
    plan = [
        (repetition, workload)
        for repetition in range(args.repetitions)
        for workload in workloads(args, model, scratch)
    ]
    outcomes = Outcomes(without_folders(args.model), args.output_dir)
    made = provenance()
    terminal = sys.stderr.isatty()
    with tqdm(plan, unit="run", desc="measurements", disable=not terminal) as bar:
        for repetition, workload in bar:
            if outcomes.skips(workload):
                continue
            message = run_one(args, repetition, workload)
            line = outcomes.add(workload, repetition, message)
            tqdm.write(line, file=sys.stderr)
            save(args.output_dir, made, outcomes)
    if not outcomes.measurements:
        sys.exit(f"nothing was measured, see {args.output_dir}/streams.json")
    rows = summarise(outcomes.measurements)
    print(table(rows), *speedup_lines(rows), *outcomes.problems, sep="\n")
    print(f"written: {args.output_dir}/streams.json", end="")
    print("", *plot_all(rows, outcomes.measurements, args.output_dir), sep=", ")


def run_one(args: argparse.Namespace, repetition: int, workload: Workload) -> Any:
    """One measurement; see ``streams.launch.measure``."""
    openvino = workload.peer.startswith("openvino")
    python = args.openvino_python if openvino else sys.executable
    if python is None:
        reason = "no --openvino-python (see --help)"
        return {"skipped": reason, "everywhere": True}
    name = f"{workload.peer}-{workload.window}-{workload.streams}-{repetition}.log"
    return measure(workload, args.output_dir / "logs" / name, python)


def save(folder: Path, made: dict[str, Any], outcomes: Outcomes) -> None:
    """Write ``streams.json``.

    Args:
        folder: where to.
        made: the run's provenance.
        outcomes: of the workloads so far.
    """
    document = {
        "provenance": made,
        "environment": {name: engine_environment()[name] for name in SETTINGS},
        "summary": summarise(outcomes.measurements),
        "measurements": outcomes.measurements,
        "problems": [asdict(problem) for problem in outcomes.problems],
    }
    (folder / "streams.json").write_text(json.dumps(document, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ``--quick`` changes defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="random-29m",
        help=f"folder or name of a checkpoint, or one of {', '.join(SHAPES)}",
    )
    add("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    add(
        "--concurrency",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="STREAMS",
    )
    add(
        "--window",
        nargs="+",
        type=int,
        default=[512],
        metavar="TOKENS",
        help="tokens that a stream keeps, sinks included (the paper's cache size)",
    )
    add("--sink-tokens", type=int, default=4)
    add(
        "--length-windows", type=float, default=4.0, help="length of a text, in windows"
    )
    add("--prompt-tokens", type=int, help="default: one window")
    add("--kv-windows", type=float, default=0.0, help="size of the KV pool, in windows")
    add(
        "--seconds",
        type=float,
        default=20.0,
        help="limit of recompute and hf once all streams write; 0: none",
    )
    add("--repetitions", type=int, default=3)
    add(
        "--dtype",
        default="bfloat16" if torch.cuda.is_available() else "float32",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    add(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "fp8", "fp8_e4m3", "fp8_e5m2"],
        help="of vLLM's engines; OpenVINO GenAI takes u8 for fp8, hf --dtype",
    )
    add("--eager", action="store_true", help="without torch.compile")
    add(
        "--block-size",
        type=int,
        help="default: vLLM's, 16 on a GPU, 128 on a CPU, there 32 with --kv-windows",
    )
    add(
        "--max-num-batched-tokens", type=int, help="default: four windows, at most 2048"
    )
    add("--seed", type=int, default=0)
    add(
        "--quick",
        action="store_true",
        help="a few minutes on two cores: 8 streams, eager",
    )
    add("--openvino-python", help="interpreter of an environment with OpenVINO GenAI")
    add("--output-dir", type=Path, default=Path("bench_out"))
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    problem = check(args)
    if problem:
        parser.error(problem)
    return args


if __name__ == "__main__":
    main()
