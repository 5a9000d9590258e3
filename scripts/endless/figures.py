# SPDX-License-Identifier: Apache-2.0
"""Step time, memory and KV blocks over the text: summed up, thinned out, plotted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from endless.scenarios import TENTHS
from endless.series import Series


def summarise(series: Series, filled: int) -> dict[str, Any]:
    """Step time by tenths, growth of memory, blocks; past ``filled`` tokens of text."""
    tokens, seconds = np.array(series.tokens), np.array(series.seconds)
    steady = seconds[tokens > filled]
    tenths = [1e3 * float(np.median(part)) for part in np.array_split(steady, TENTHS)]
    memory_tokens = np.array(series.memory_tokens)
    past = memory_tokens > filled
    growth = {}
    for role, resident in series.memory.items():
        if past.sum() > 2 and np.ptp(memory_tokens[past]):
            slope, _ = np.polyfit(memory_tokens[past], np.array(resident)[past], 1)
            growth[role] = float(slope)
    blocks = np.array(series.blocks)[past]
    return {
        "steps": len(steady),
        "step_ms_tenths": tenths,
        "step_ms_p10_p90": [1e3 * float(x) for x in np.percentile(steady, (10, 90))],
        "last_over_first": tenths[-1] / tenths[0],
        "bytes_per_token": growth,
        "peak_mib": {role: max(r) / 2**20 for role, r in series.memory.items() if r},
        "kv_blocks_min_max": [float(blocks.min()), float(blocks.max())]
        if blocks.size
        else None,
    }


def thin(series: Series, points: int = 400) -> dict[str, list[float]]:
    """Medians of the step time and samples of memory, few enough for a file."""
    parts = np.array_split(np.arange(len(series.tokens)), points)
    tokens, seconds = np.array(series.tokens), np.array(series.seconds)
    keep = np.unique(np.linspace(0, len(series.memory_tokens) - 1, points).astype(int))
    return {
        "tokens": [float(tokens[part[-1]]) for part in parts if part.size],
        "step_ms": [1e3 * float(np.median(seconds[p])) for p in parts if p.size],
        "memory_tokens": [series.memory_tokens[i] for i in keep],
        "kv_blocks": [series.blocks[i] for i in keep],
        **{
            f"{role}_mib": [resident[i] / 2**20 for i in keep]
            for role, resident in series.memory.items()
        },
    }


def plot(models: dict[str, Any], path: Path) -> None:
    """Step time, memory and blocks over the text, a row for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(models), 3, figsize=(13, 3.6 * len(models)), squeeze=False
    )
    for axes, (model, result) in zip(rows, models.items(), strict=True):
        for index, (name, scenario) in enumerate(result["scenarios"].items()):
            series, color = scenario["series"], f"C{index}"
            axes[0].plot(series["tokens"], series["step_ms"], color, label=name)
            if "young_ms" in series:
                new = "a new stream beside it"
                axes[0].plot(
                    series["tokens"], series["young_ms"], f"{color}:", label=new
                )
            for role, style in (
                ("worker", "-"),
                ("engine core", "--"),
                ("front end", ":"),
            ):
                if f"{role}_mib" in series:
                    resident = np.array(series[f"{role}_mib"])
                    axes[1].plot(series["memory_tokens"], resident, color + style)
            if "kv_blocks" in series:
                axes[2].plot(series["memory_tokens"], series["kv_blocks"], color)
        titles = (
            "step, ms",
            "resident, MiB (-- engine core, : front end)",
            "KV blocks",
        )
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(f"{model}: {title}", fontsize=9)
            axis.set_xscale("log")
            axis.set_xlabel("text, tokens")
            axis.set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
