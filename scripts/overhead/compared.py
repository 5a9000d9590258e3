# SPDX-License-Identifier: Apache-2.0
"""How the steps of two engines compare: ratios, a table, a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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
