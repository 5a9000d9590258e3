# SPDX-License-Identifier: Apache-2.0
"""The result of a load test as a table and as a plot, and its progress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from load.memory import LASTING, Samples


def table(result: dict[str, Any]) -> str:
    """Figures and checks, a line each."""
    rows: list[tuple[str, str]] = []
    for key, form in (
        ("duration", "{:.0f} s"),
        ("written_output_tokens", "{:,}"),
        ("completed", "{:,}"),
        ("total_input_tokens", "{:,}"),
        ("total_output_tokens", "{:,}"),
        ("output_throughput", "{:.0f} tokens/s"),
        ("median_ttft_ms", "{:,.0f} ms"),
        ("p99_ttft_ms", "{:,.0f} ms"),
        ("median_itl_ms", "{:.1f} ms"),
        ("p99_itl_ms", "{:.1f} ms"),
        ("median_e2el_ms", "{:,.0f} ms"),
        ("preemptions", "{:.0f}"),
        ("prefix_cache_hit_share", "{:.1%}"),
    ):
        if result.get(key) is not None:
            rows.append((key.replace("_", " "), form.format(result[key])))
    rows += [(name, f"{count:,}") for name, count in sorted(result["counts"].items())]
    for role, growth in result["memory"].items():
        rows.append(
            (
                f"RSS of {role}",
                f"{growth['bytes_per_token']:+.2f} bytes/token, grew "
                f"{growth['grown_bytes'] / 1e6:+.2f} MB, noise "
                f"{growth['noise_bytes'] / 1e6:.2f} MB",
            )
        )
    rows += [
        (f"answers {verdict}", f"{count}")
        for verdict, count in result["spot_checks"]["counts"].items()
    ]
    for fault in result["faults"]:
        exit_seconds = fault["seconds_to_exit"]
        rows.append(
            (
                f"{fault['engine']}, {fault['killed']} killed",
                f"{sum(fault['client_errors'].values())} clients failed within "
                f"{fault['seconds_to_last_error']:.1f} s, server ended "
                + (f"after {exit_seconds:.1f} s" if exit_seconds else "never")
                + f" with status {fault['exit_status']}",
            )
        )
    answers = {True: "yes", False: "no", None: "not compared"}
    rows += [
        (f"{role} killed, exit status as stock vLLM", answers[same])
        for role, same in result["exit_status_as_stock"].items()
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += [f"FAILED: {name}: {why}" for name, why in result["failed_checks"]]
    return "\n".join(lines)


def plot(
    samples: Samples, series: dict[str, list[float]], half: int, path: Path
) -> None:
    """Memory, KV cache and requests, preemptions over the tokens written.

    Args:
        samples: of memory.
        series: of the metrics, a value for each of ``series["tokens"]``.
        half: tokens from which memory is judged.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    for role in LASTING:
        if role in samples.rss:
            resident = samples.rss[role]
            grown = [(value - resident[0]) / 2**20 for value in resident]
            axes[0].plot(samples.tokens, grown, label=role)
    axes[0].axvline(half, color="0.7", linestyle=":")
    axes[0].set_title("resident memory since the start, MiB", fontsize=9)
    axes[0].legend(fontsize=8)
    for name in ("running", "waiting"):
        axes[1].plot(series["tokens"], series[name], label=name)
    axes[1].set_title("requests", fontsize=9)
    axes[1].legend(fontsize=8)
    axes[2].plot(series["tokens"], series["preemptions"], "C3")
    axes[2].set_title("preemptions", fontsize=9)
    used = axes[2].twinx()
    used.plot(series["tokens"], series["kv_cache_usage"], "C0", linewidth=0.6)
    used.set_ylim(0, 1)
    used.set_ylabel("share of KV blocks in use", fontsize=8, color="C0")
    for axis in axes:
        axis.set_xlabel("output tokens written")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def progress(what: Any, name: str, unit: str) -> Any:
    """A bar on a terminal, a line now and then elsewhere; over a number or a list.

    Nothing is shown without a name.
    """
    counted = {"total": what} if isinstance(what, int) else {"iterable": what}
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        **counted,
        desc=name,
        unit=unit,
        unit_scale=isinstance(what, int),
        mininterval=interval,
        maxinterval=interval,
        disable=not name,
    )
