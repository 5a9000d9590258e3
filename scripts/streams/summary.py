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
    "measured_output_throughput",
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
WRITING, WHOLE = "steady_output_throughput", "output_throughput"
"""Throughputs that compare like with like: while all streams write, of whole texts."""


def summarise(measurements: Iterable[Row]) -> list[Row]:
    """A row for each window, number of streams and peer.

    Args:
        measurements: the workload's fields and its result's, flat.

    Returns:
        Medians over repetitions under the same keys, ``repetitions``, the lowest and
        highest ``output_throughput`` as ``output_throughput_min_max``, and whether a
        throughput is an estimate as ``extrapolated``.
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
        row["extrapolated"] = any(one["extrapolated"] for one in repeated)
        rows.append(row)
    return rows


def speedups(
    rows: list[Row], over: str, key: str = WRITING, of: str = "sink_paged"
) -> dict[tuple[int, int], float]:
    """Throughput of one peer over that of another, by ``(window, streams)``.

    Args:
        rows: of ``summarise``.
        over: the slower peer.
        key: ``WRITING`` or ``WHOLE``, which a run that was cut has too.
        of: the faster peer.
    """
    rates = {
        (row["window"], row["streams"], row["peer"]): row[key]
        for row in rows
        if row[key] is not None
    }
    return {
        (window, streams): rates[window, streams, of] / rate
        for (window, streams, peer), rate in rates.items()
        if peer == over and (window, streams, of) in rates
    }


def speedup_lines(rows: list[Row]) -> list[str]:
    """Speed-ups over the peers that may be cut, for a terminal."""
    lines = []
    for over in ("recompute", "hf"):
        writing = speedups(rows, over)
        for cell, whole in speedups(rows, over, WHOLE).items():
            ratios = [f"{_number(whole)}x over whole texts"]
            if cell in writing:
                ratios.insert(0, f"{_number(writing[cell])}x while all write")
            where = "window {}, {} streams".format(*cell)
            lines.append(f"sink_paged over {over}, {where}: {', '.join(ratios)}")
    return lines


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
    ("run", ""),
)
NOTES = {
    "cut": "stopped after --seconds; its output tok/s is estimated for whole texts",
    "short": "texts ended before their length; output tok/s is of what was written",
}
"""What the last column says of a run whose streams did not all complete."""


def table(rows: list[Row]) -> str:
    """Aligned columns, two lines of heading, notes below."""
    body = [
        _line(row) for row in sorted(rows, key=lambda r: (r["window"], r["streams"]))
    ]
    lines = [[title for title, _ in HEADER], [unit for _, unit in HEADER], *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.ljust(width) if index == 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    kinds = {line[-1] for line in body}
    notes = [f"{kind}: {note}" for kind, note in NOTES.items() if kind in kinds]
    return "\n".join(aligned + notes)


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
        _kind(row),
    ]


def _kind(row: Row) -> str:
    """A key of ``NOTES``, or ``whole``."""
    if row["extrapolated"]:
        return "cut"
    return "whole" if row["completed"] >= row["streams"] else "short"


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or value != value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
