# SPDX-License-Identifier: Apache-2.0
"""Plots: throughput, time per token over the text, speed-up over recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from streams.summary import WRITING, Row, speedups  # noqa: E402

STYLES = {
    "sink_paged": ("vLLM + sink_paged", "C0", "o"),
    "vllm": ("vLLM, full attention", "C1", "s"),
    "recompute": ("vLLM, window recomputed", "C3", "^"),
    "hf": ("Hugging Face loop", "C2", "D"),
    "openvino": ("OpenVINO GenAI, eviction", "C4", "v"),
    "openvino_full": ("OpenVINO GenAI, full attention", "C5", "P"),
}

FAR_APART = 5
"""Ratio of times from which an axis is logarithmic."""


def plot_all(rows: list[Row], measurements: list[Row], folder: Path) -> list[Path]:
    """Write what there is data for; the files written."""
    files = []
    for name, draw in (
        ("throughput", lambda: _throughput(rows)),
        ("time_per_token", lambda: _time_per_token(measurements)),
        ("speedup", lambda: _speedup(rows)),
    ):
        figure = draw()
        if figure is None:
            continue
        files.append(folder / f"{name}.png")
        figure.tight_layout()
        figure.savefig(files[-1], dpi=130)
        pyplot.close(figure)
    return files


def _values(rows: list[Row], key: str) -> list[Any]:
    return sorted({row[key] for row in rows})


def _peers(rows: list[Row]) -> list[str]:
    present = {row["peer"] for row in rows}
    return [peer for peer in STYLES if peer in present]


def _grid(columns: int, rows: int = 1) -> Any:
    size = (4.6 * columns + 0.6, 3.6 * rows)
    figure = pyplot.figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _log_scale(axis: Any) -> None:
    """Logarithmic, labelled with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", labelsize=8)


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _throughput(rows: list[Row]) -> Any:
    """Output tokens a second against concurrency, an axis for each window."""
    windows = _values(rows, "window")
    figure, axes = _grid(len(windows))
    for axis, window in zip(axes[0], windows, strict=True):
        for peer in _peers(rows):
            label, color, marker = STYLES[peer]
            mine = sorted(
                (row["streams"], row["output_throughput"])
                for row in rows
                if row["peer"] == peer and row["window"] == window
            )
            if mine:
                axis.plot(
                    *zip(*mine, strict=True), color=color, marker=marker, label=label
                )
        axis.set_xscale("log", base=2)
        streams = _values(rows, "streams")
        axis.set_xticks(streams, [str(number) for number in streams])
        axis.set_title(f"window of {window} tokens", fontsize=10)
        axis.set_xlabel("concurrent streams")
        axis.set_ylabel("output tokens/s")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return figure


def _time_per_token(measurements: list[Row]) -> Any:
    """Time from token to token against the text's length; first repetition."""
    windows, streams = _values(measurements, "window"), _values(measurements, "streams")
    figure, axes = _grid(len(streams), len(windows))
    seen = set()
    for one in measurements:
        cell = one["window"], one["streams"], one["peer"]
        text = one["itl_by_text"]
        if cell in seen or not text["itl_ms"]:
            continue
        seen.add(cell)
        axis = axes[windows.index(one["window"])][streams.index(one["streams"])]
        label, color, _ = STYLES[one["peer"]]
        axis.plot(text["text_tokens"], text["itl_ms"], color=color, label=label)
    for window, row in zip(windows, axes, strict=True):
        for number, axis in zip(streams, row, strict=True):
            title = f"window {window}, {number} stream{'s' * (number > 1)}"
            axis.set_title(title, fontsize=10)
            times = [time for line in axis.lines for time in line.get_ydata()]
            if times and max(times) > FAR_APART * min(times):
                _log_scale(axis)
            else:
                axis.set_ylim(bottom=0)
            axis.set_xlabel("text, tokens")
            axis.grid(alpha=0.3, which="both")
        row[0].set_ylabel("time per output token, ms")
    # A peer need not be in every axis.
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    axes[0][0].legend(handles=list(lines.values()), fontsize=8)
    return figure


def _speedup(rows: list[Row]) -> Any:
    """Time per token while all streams write, recomputed and ours (Figure 10)."""
    ratios = speedups(rows, "recompute")
    if not ratios:
        return None
    figure, axes = _grid(2)
    streams = min(number for _, number in ratios)
    windows = sorted(window for window, number in ratios if number == streams)
    places = list(range(len(windows)))
    for peer, shift in (("recompute", -0.2), ("sink_paged", 0.2)):
        label, color, _ = STYLES[peer]
        times = [
            1e3 * streams / row[WRITING]
            for window in windows
            for row in rows
            if (row["window"], row["streams"], row["peer"]) == (window, streams, peer)
        ]
        bars = axes[0][0].bar(
            [place + shift for place in places], times, 0.4, color=color, label=label
        )
        axes[0][0].bar_label(bars, fmt=_three_digits, fontsize=8)
    _log_scale(axes[0][0])
    axes[0][0].set_ylabel("time per token of a stream, ms")
    axes[0][0].legend(fontsize=8)
    values = [ratios[window, streams] for window in windows]
    bars = axes[0][1].bar(places, values, 0.5, color="C0")
    axes[0][1].bar_label(bars, fmt="%.3gx", fontsize=8)
    axes[0][1].set_ylabel("speed-up over recomputation")
    for axis in axes[0]:
        axis.set_xlim(-0.8, len(windows) - 0.2)
        axis.set_xticks(places, [str(window) for window in windows])
        axis.set_xlabel("cache size, tokens")
        axis.set_title(f"{streams} stream{'s' * (streams > 1)}", fontsize=10)
    return figure
