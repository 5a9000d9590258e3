# SPDX-License-Identifier: Apache-2.0
"""Watches a server: its metrics and memory under load, and whether it is idle."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import httpx

from load.clients import Clients
from load.memory import Samples
from load.server import Server, ServerError, extension_metrics

SAMPLE_SECONDS = 1.0
IDLE_SECONDS = 30.0
"""How long requests and blocks may take to be gone after the clients are."""
SERIES = {
    "tokens": "",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
}


async def observe(
    server: Server,
    clients: Clients,
    concurrency: int,
    samples: Samples,
    series: dict[str, list[float]],
) -> None:
    """Let the clients run; memory and metrics are sampled meanwhile.

    Raises:
        ServerError: the server ended.
    """
    running = asyncio.ensure_future(clients.run(concurrency))
    while not running.done():
        tokens = clients.seen.written
        samples.take(server, tokens)
        with contextlib.suppress(httpx.HTTPError):
            metrics = await asyncio.to_thread(server.metrics)
            for name, metric in SERIES.items():
                series[name].append(metrics[metric] if metric else tokens)
        await asyncio.wait([running], timeout=SAMPLE_SECONDS)
        if server.process.poll() is not None:
            running.cancel()
            raise ServerError(f"the server ended under load: {server.log_tail()}")
    await running


def wait_until_idle(server: Server) -> tuple[dict[str, float], float]:
    """Until nothing is left of any request, or ``IDLE_SECONDS``; last metrics, time."""
    begin = time.monotonic()
    while True:
        metrics, seconds = server.metrics(), time.monotonic() - begin
        if not leftovers(metrics) or seconds > IDLE_SECONDS:
            return metrics, seconds
        time.sleep(0.2)


def leftovers(metrics: dict[str, float]) -> dict[str, float]:
    """Gauges of an idle server that are not 0."""
    gauges = [SERIES[name] for name in ("running", "waiting", "kv_cache_usage")]
    ours = [n for n in extension_metrics(metrics) if not n.endswith("_total")]
    return {name: metrics[name] for name in (*gauges, *ours) if metrics[name]}


def counters(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """What a load added to the server's counters; no share of hits without queries."""
    hits, queries, written = (
        after[name] - before[name]
        for name in (
            "vllm:prefix_cache_hits_total",
            "vllm:prefix_cache_queries_total",
            "vllm:generation_tokens_total",
        )
    )
    return {
        "generation_tokens": written,
        "preemptions": after["vllm:num_preemptions_total"],
        "prefix_cache_hit_share": hits / queries if queries else None,
    }
