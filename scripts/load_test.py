# SPDX-License-Identifier: Apache-2.0
r"""Load and faults: what ``vllm serve --sink-eviction`` does when it is used badly.

Starts the server itself, with a KV pool too small for its clients, and checks:

- **load**: concurrent clients stream completions and conversations, prompts and outputs
  several windows long, until ``--output-tokens`` have been written. Some leave before
  the first token or in the middle, some of these send the same request again, turns of
  a conversation resend all of it, and bad requests come in between: each gets a 4xx,
  and nothing else fails;
- **preemption**: the pool runs out, and streams are preempted and resumed;
- **no leak**: afterwards no request is left and no KV block is in use, and the resident
  memory of no process has grown beyond its noise over the second half of the tokens
  (``load/memory.py``; ``--quick`` has too few tokens to judge);
- **exactness**: a random sample of the answers, greedy and seeded, is what the same
  request gets when it is alone, token by token (``load/exactness.py``);
- **faults**: with streams past the window, the engine core is killed, of another server
  the worker. Clients get errors, the log says what is gone, the server ends within a
  minute, nothing of it is left. The same on stock vLLM for comparison: the exit status
  (0 in vLLM 0.32.0) must be the same; with ``--no-stock`` it is not compared.

Figures of the load are those of ``vllm bench serve``, by its key names, over answers
that ended. Written to ``--output-dir``: ``load.json``, as soon as the load is over and
again after each later check, ``load.png`` and the servers' logs. The exit status is 1
if a check failed, be it by an error of the server.

Examples::

    python scripts/load_test.py --quick
    OMP_NUM_THREADS=1 python scripts/load_test.py    # cores shared with other programs
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import httpx
import numpy as np
from load.bad_requests import catalogue
from load.checks import (
    OURS,
    STOCK,
    Failed,
    compare_exit_statuses,
    leaks,
    reported,
)
from load.clients import Clients, Seen
from load.exactness import Undisturbed, Verdict, spot_checks
from load.faults import kill_under_load
from load.figures import bench_figures
from load.memory import Growth, Samples, judge_memory
from load.report import plot, progress, table
from load.server import Server, ServerError, extension_metrics, running_server
from load.streaming import Answer
from load.watch import SERIES, counters, observe, wait_until_idle
from load.workload import Workload
from provenance import provenance

QUICK: dict[str, Any] = {
    "concurrency": 32,
    "kv_blocks": 190,
    "output_tokens": 10_000,
    "spot_checks": 10,
    "longest_prompt": 4.0,
    "longest_output": 2.5,
    "fault_streams": 8,
    "eager": True,
    "no_stock": True,
}
STEP_TOKENS = 512
"""Most tokens of a step."""


def main() -> None:
    """Run and print."""
    args = parse_arguments()
    # As after Ctrl-C: the server that runs is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    flags = [*sink_flags(args), *server_flags(args)]
    flags += ["--enforce-eager"] if args.eager else []
    try:
        with running_server(args.model, flags, args.output_dir / "load.log") as server:
            result, seen = run_load(args, server)
            result["server_flags"] = flags
            result["environment"] = server.recorded_environment()
            save(args, result)
            run_spot_checks(args, server, seen.finished, result)
            save(args, result)
            if not args.no_faults:
                run_fault(args, server, OURS, "engine core", result)
    except (ServerError, httpx.HTTPError) as error:  # before there was a load
        sys.exit(f"FAILED: {error}")
    if not args.no_faults:
        run_other_faults(args, result)
    save(args, result)
    print(table(result))
    print(f"written: {args.output_dir}/load.json, {args.output_dir}/load.png")
    sys.exit(bool(result["failed_checks"]))


def server_flags(args: argparse.Namespace) -> list[str]:
    """Flags of every server."""
    flags = [
        *("--max-num-seqs", args.concurrency, "--block-size", args.block_size),
        *("--max-num-batched-tokens", STEP_TOKENS),
        *("--max-logprobs", -1, "--logprobs-mode", "processed_logprobs"),
        "--disable-uvicorn-access-log",
    ]
    return [str(flag) for flag in flags]


def sink_flags(args: argparse.Namespace) -> list[str]:
    """Flags of a server with sink eviction, and with a pool that runs out."""
    flags = ["--sink-eviction", "--max-model-len", args.max_model_len]
    return [str(flag) for flag in (*flags, "--num-gpu-blocks-override", args.kv_blocks)]


def warm_up(server: Server) -> None:
    """Let the server run a step of every size.

    On a CPU with AVX-512 oneDNN keeps kernels for every number of tokens that a step
    has had, in the end half a gigabyte, with sink eviction and without. What is to be
    judged is what grows with the tokens.
    """
    rng = np.random.default_rng(0)
    with httpx.Client(base_url=server.url, timeout=600) as http:
        for size in progress(range(1, STEP_TOKENS + 1), "warm-up", "step"):
            prompt = rng.integers(256, size=size).tolist()
            body = {"model": server.model, "prompt": prompt, "max_tokens": 1}
            http.post("/v1/completions", json=body).raise_for_status()


def run_load(args: argparse.Namespace, server: Server) -> tuple[dict[str, Any], Seen]:
    """Load a server and wait until it is idle; the figures, and what clients saw."""
    samples, series = Samples(), {name: [] for name in SERIES}
    workload = Workload(
        args.seed,
        args.max_model_len,
        (0.125, args.longest_prompt),
        (0.5, args.longest_output),
    )
    bad = catalogue(args.model)
    warm_up(server)
    before = server.metrics()
    with progress(args.output_tokens, "load", "tok") as bar:
        goal = args.output_tokens
        clients = Clients(server.url, args.model, workload, bad, goal, bar.update)
        begin = time.perf_counter()
        asyncio.run(observe(server, clients, args.concurrency, samples, series))
        duration = time.perf_counter() - begin
    seen = clients.seen
    failed: Failed = [("load", failure) for failure in seen.failures]
    missing = {one.name for one in bad} - seen.refusals.keys()
    failed += [("bad requests", f"not sent: {name}") for name in sorted(missing)]
    memory: dict[str, Growth] = {}
    with reported("memory", failed):
        memory = judge_memory(samples, args.output_tokens)
    for role, growth in memory.items():
        if not growth.ok:
            failed.append(("memory", f"{role} grew: {growth}"))
    result = {
        **bench_figures(seen, duration),
        "written_output_tokens": seen.written,
        "counts": dict(seen.counts),
        "refusals": {name: dict(codes) for name, codes in seen.refusals.items()},
        "memory": {role: growth.to_json() for role, growth in memory.items()},
        "spot_checks": {"counts": {}, "tokens": 0, "comparisons": []},
        "sink_paged_metrics": {"start": extension_metrics(before)},
        "series": series | {"rss": samples.rss},
        "faults": [],
        "exit_status_as_stock": {},
        "failed_checks": failed,
    }
    with reported("leak", failed):
        after, seconds = wait_until_idle(server)
        result |= counters(before, after) | {"seconds_until_idle": seconds}
        result["sink_paged_metrics"]["after_load"] = extension_metrics(after)
        failed += leaks("load", after)
        if not result["preemptions"]:
            failed.append(("preemption", "no stream was preempted"))
    with reported("plot", failed):
        half = args.output_tokens // 2
        plot(samples, series, half, args.output_dir / "load.png")
    return result, seen


def run_spot_checks(
    args: argparse.Namespace,
    server: Server,
    answers: list[Answer],
    result: dict[str, Any],
) -> None:
    """Compare answers with undisturbed ones; adds to the result what came of it.

    The first error ends them, and is a failed check.
    """
    comparisons = []
    failed: Failed = result["failed_checks"]
    with (
        reported("spot checks", failed),
        progress(args.spot_checks, "spot checks", "answer") as bar,
    ):
        undisturbed = Undisturbed(server.url, args.model)
        for comparison in spot_checks(
            undisturbed, answers, args.spot_checks, args.seed
        ):
            comparisons.append(comparison)
            bar.update()
    verdicts = Counter(comparison.verdict for comparison in comparisons)
    result["spot_checks"] = {
        "counts": {verdict.value: verdicts[verdict] for verdict in Verdict},
        "tokens": sum(comparison.tokens for comparison in comparisons),
        "comparisons": [
            asdict(comparison) | {"verdict": comparison.verdict.value}
            for comparison in comparisons
        ],
    }
    for comparison in comparisons:
        if comparison.verdict is Verdict.DIFFERENT:
            failed.append(("exactness", str(comparison)))
    with reported("leak", failed):
        last, _ = wait_until_idle(server)
        result["sink_paged_metrics"]["end"] = extension_metrics(last)
        failed += leaks("spot checks", last)


def run_fault(
    args: argparse.Namespace,
    server: Server,
    engine: str,
    role: str,
    result: dict[str, Any],
) -> None:
    """Kill a process of a server under load; adds to the result what came of it."""
    past = 2 * args.max_model_len
    check, failed = f"{role} killed, {engine}", result["failed_checks"]
    with reported(check, failed):
        outcome = asyncio.run(kill_under_load(server, role, args.fault_streams, past))
        result["faults"].append({"engine": engine} | outcome.to_json())
        failed += [(check, problem) for problem in outcome.problems()]


def run_other_faults(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Kill a worker of ours, and both of stock vLLM; compare the exit statuses."""
    longest = 1 << 17
    stock = [
        *("--hf-overrides", json.dumps({"max_position_embeddings": longest})),
        *("--num-gpu-blocks-override", str(longest // args.block_size + 2)),
    ]
    cases = [(OURS, "worker", sink_flags(args))]
    if not args.no_stock:
        cases += [(STOCK, role, stock) for role in ("worker", "engine core")]
    failed: Failed = result["failed_checks"]
    for engine, role, engine_flags in progress(cases, "faults", "server"):
        # vLLM's own placement gives the worker a process.
        own_process = {"VLLM_CPU_OMP_THREADS_BIND": "auto"} if role == "worker" else {}
        log = args.output_dir / f"{engine} {role}.log".replace(" ", "-")
        flags = [*engine_flags, *server_flags(args), "--enforce-eager"]
        with (
            reported(f"{role} killed, {engine}", failed),
            running_server(args.model, flags, log, own_process) as server,
        ):
            run_fault(args, server, engine, role, result)
    result["exit_status_as_stock"] = compare_exit_statuses(result["faults"], failed)


def save(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write ``load.json``."""
    document = {"provenance": provenance()} | result
    path = args.output_dir / "load.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ``--quick`` changes defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="models/pocket", help="a folder or name of a checkpoint")
    add("--concurrency", type=int, default=64, help="clients at once")
    add("--output-tokens", type=int, default=500_000, help="to be written under load")
    add("--max-model-len", type=int, default=256, help="tokens a stream keeps")
    add("--block-size", type=int, default=32)
    add("--kv-blocks", type=int, default=380, help="of the pool, too few for all")
    add("--longest-prompt", type=float, default=8.0, metavar="WINDOWS")
    add("--longest-output", type=float, default=10.0, metavar="WINDOWS")
    add("--spot-checks", type=int, default=100, help="answers compared")
    add("--fault-streams", type=int, default=32, help="that write at a kill")
    add("--seed", type=int, default=0, help="of the workload")
    add("--eager", action="store_true", help="without torch.compile")
    add("--no-faults", action="store_true", help="kill nothing")
    add("--no-stock", action="store_true", help="kill nothing of stock vLLM")
    add("--quick", action="store_true", help="a few minutes on two cores, eager")
    add("--output-dir", type=Path, default=Path("bench_out"))
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


if __name__ == "__main__":
    main()
