# SPDX-License-Identifier: Apache-2.0
"""Repetitions to medians, medians to a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
CELL = ("window", "streams", "peer")
FIGURES = (
    "output_throughput",
    "steady_output_throughput",
    "median_itl_ms",
    "p99_itl_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "num_preemptions",
    "kv_blocks_peak",
    "kv_blocks",
    "peak_rss_bytes",
    "longest_text",
    "completed",
)
"""Keys of a measurement of which the median over repetitions is taken."""


def summarise(measurements: Iterable[Row]) -> list[Row]:
    """A row for each window, number of streams and peer.

    Args:
        measurements: the workload's fields and its result's, flat.

    Returns:
        Medians over repetitions under the same keys, ``repetitions``, and the lowest
        and highest ``output_throughput`` as ``output_throughput_min_max``.
    """
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for one in measurements:
        cells.setdefault(tuple(one[key] for key in CELL), []).append(one)
    rows = []
    for cell, repeated in cells.items():
        row: Row = dict(zip(CELL, cell, strict=True))
        row["repetitions"] = len(repeated)
        for key in FIGURES:
            values = [one[key] for one in repeated if one.get(key) is not None]
            row[key] = statistics.median(values) if values else None
        rates = [one["output_throughput"] for one in repeated]
        row["output_throughput_min_max"] = [min(rates), max(rates)]
        rows.append(row)
    return rows


def speedups(
    rows: list[Row], over: str = "recompute", of: str = "sink_paged"
) -> dict[tuple[int, int], float]:
    """Time per token of one peer over that of another, by ``(window, streams)``."""
    times = {
        (row["window"], row["streams"], row["peer"]): row["median_itl_ms"]
        for row in rows
    }
    return {
        (window, streams): time / times[window, streams, of]
        for (window, streams, peer), time in times.items()
        if peer == over and (window, streams, of) in times
    }


HEADER = (
    ("window", "tokens"),
    ("streams", ""),
    ("peer", ""),
    ("output", "tok/s"),
    ("lowest-highest", "tok/s"),
    ("all writing", "tok/s"),
    ("token p50", "ms"),
    ("p99", "ms"),
    ("first p50", "ms"),
    ("preempted", ""),
    ("KV blocks", "peak/pool"),
    ("peak RSS", "MiB"),
    ("text", "tokens"),
)


def table(rows: list[Row]) -> str:
    """Aligned columns, two lines of heading."""
    body = [
        _line(row) for row in sorted(rows, key=lambda r: (r["window"], r["streams"]))
    ]
    lines = [[title for title, _ in HEADER], [unit for _, unit in HEADER], *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(row: Row) -> list[str]:
    low, high = row["output_throughput_min_max"]
    blocks = "-"
    if row["kv_blocks_peak"] is not None:
        blocks = f"{row['kv_blocks_peak']:.0f}/{row['kv_blocks']:.0f}"
    return [
        str(row["window"]),
        str(row["streams"]),
        row["peer"],
        _number(row["output_throughput"]),
        f"{_number(low)}-{_number(high)}" if row["repetitions"] > 1 else "-",
        _number(row["steady_output_throughput"]),
        _number(row["median_itl_ms"]),
        _number(row["p99_itl_ms"]),
        _number(row["median_ttft_ms"]),
        "-" if row["num_preemptions"] is None else f"{row['num_preemptions']:.0f}",
        blocks,
        f"{row['peak_rss_bytes'] / 2**20:.0f}",
        f"{row['longest_text']:.0f}",
    ]


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or value != value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
