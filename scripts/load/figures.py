# SPDX-License-Identifier: Apache-2.0
"""Figures of a load, computed by vLLM's benchmark and named as it names them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from vllm.benchmarks.serve import calculate_metrics

from load.clients import Seen


def bench_figures(seen: Seen, duration: float) -> dict[str, Any]:
    """Of the answers that ended, by the key names of ``vllm bench serve``."""
    outputs = [answer.timing for answer in seen.finished]
    with contextlib.redirect_stdout(io.StringIO()):
        metrics, _ = calculate_metrics([], outputs, duration, None, [90, 99], {})
    figures = {
        "duration": duration,
        "completed": metrics.completed,
        "failed": seen.counts["failed"],
        "total_input_tokens": metrics.total_input,
        "total_output_tokens": metrics.total_output,
        "request_throughput": metrics.request_throughput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_token_throughput,
        "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
        "max_concurrent_requests": metrics.max_concurrent_requests,
    }
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std"):
            key = f"{statistic}_{name}_ms"
            figures[key] = float(getattr(metrics, key))
        for percentile, value in getattr(metrics, f"percentiles_{name}_ms"):
            figures[f"p{percentile}_{name}_ms"] = float(value)
    return figures
