# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of StreamEval: accuracy by position in the text and by distance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sink_paged.evaluation.report import Table, geometric_bins, new_axes, save_figure
from sink_paged.evaluation.stream_answers import Outcome
from sink_paged.evaluation.stream_eval import Style


@dataclass
class Answers:
    """What one config answered.

    Attributes:
        tokens: of its longest text.
        seconds: of all its answers, the engine's start not included.
        by_position: outcomes of the questions at ``--distance``.
        by_distance: outcomes of the questions at ``--distances``.
        refusal: of a server, why it stopped early.
    """

    tokens: int = 0
    seconds: float = 0.0
    by_position: list[Outcome] = field(default_factory=list)
    by_distance: list[Outcome] = field(default_factory=list)
    refusal: str = ""


@dataclass(frozen=True)
class Plan:
    """What is asked, the same of all configs.

    Attributes:
        style: of the texts.
        distances: of the sweep, in lines.
        trained: the trained length; 0 where it is not known.
        capacity: tokens of the largest cache among the configs; 0 likewise.
        line_tokens: tokens of a line.
    """

    style: Style
    distances: list[int]
    trained: int = 0
    capacity: int = 0
    line_tokens: float = 0.0

    @property
    def window_lines(self) -> float:
        """Lines that the largest cache holds."""
        return self.capacity / self.line_tokens if self.line_tokens else 0.0


def share(outcomes: Sequence[Outcome]) -> float | None:
    """Of the questions answered rightly; None without any."""
    if not outcomes:
        return None
    return sum(outcome.right for outcome in outcomes) / len(outcomes)


def interval(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Wilson's 95% interval of the accuracy."""
    n, z = len(outcomes), 1.96
    p = share(outcomes) or 0.0
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    # Rounding must not leave the share itself outside.
    return max(0.0, min(p, middle - reach)), min(1.0, max(p, middle + reach))


def between(outcomes: Iterable[Outcome], start: int, end: int) -> list[Outcome]:
    """Those asked at positions ``[start, end)``."""
    return [outcome for outcome in outcomes if start <= outcome.position < end]


def at(outcomes: Iterable[Outcome], distance: int) -> list[Outcome]:
    """Those asked at a distance."""
    return [outcome for outcome in outcomes if outcome.distance == distance]


def position_bins(plan: Plan, tokens: int) -> list[tuple[int, int]]:
    """Bins of positions: one to where the cache is full, then doubling."""
    first = plan.capacity + 1 if plan.capacity else 1024
    return list(pairwise(geometric_bins(tokens, first, per_doubling=1)))


def position_table(plan: Plan, answers: dict[str, Answers]) -> Table:
    """Accuracy by position; no figure where a config did not read all of a bin."""
    tokens = max(a.tokens for a in answers.values())
    longest = max(answers.values(), key=lambda a: a.tokens)
    rows: list[list[Any]] = []
    for start, end in position_bins(plan, tokens):
        row: list[Any] = [f"{start:,} - {end:,}"]
        row.append(len(between(longest.by_position, start, end)))
        for each in answers.values():
            found = between(each.by_position, start, end)
            row.append(share(found) if each.tokens >= end else None)
        rows.append(row)
    return Table(
        "Share of answers that are right, by position in the text",
        ["tokens", "questions", *answers],
        rows,
    )


def distance_table(plan: Plan, answers: dict[str, Answers]) -> Table:
    """Accuracy by distance."""
    longest = max(answers.values(), key=lambda a: a.tokens)
    rows: list[list[Any]] = []
    for distance in plan.distances:
        row: list[Any] = [distance]
        row.append(round(distance * plan.line_tokens) or None)
        row.append(len(at(longest.by_distance, distance)))
        row += [share(at(each.by_distance, distance)) for each in answers.values()]
        rows.append(row)
    return Table(
        "Share of answers that are right, by distance of the fact",
        ["lines back", "tokens back", "questions", *answers],
        rows,
    )


def reading_table(answers: dict[str, Answers]) -> Table:
    """What was read, and how long it took."""
    rows: list[list[Any]] = []
    for name, each in answers.items():
        asked = each.by_position + each.by_distance
        rows.append([name, each.tokens, len(asked), each.seconds])
    columns = ["config", "longest text, tokens", "questions", "seconds"]
    return Table("Reading", columns, rows)


MARKERS = "os^Dv"


def draw(axes: Any, curves: dict[str, list[tuple[float, list[Outcome]]]]) -> None:
    """Accuracy and its interval at each ``x``, a curve for each config.

    Curves are set off sideways by 2%, as equal ones would hide each other.
    """
    for number, (name, points) in enumerate(curves.items()):
        found = [(x, outcomes) for x, outcomes in points if outcomes]
        x = [x * 1.02 ** (number - (len(curves) - 1) / 2) for x, _ in found]
        y = [share(outcomes) or 0.0 for _, outcomes in found]
        ends = [interval(outcomes) for _, outcomes in found]
        bars = [
            [middle - low for middle, (low, _) in zip(y, ends, strict=True)],
            [high - middle for middle, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(
            x,
            y,
            bars,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=name,
        )


def finish(axes: Any, title: str, label: str, marks: dict[str, float]) -> None:
    """Axes, marks, legend."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, x in marks.items():
        if x:
            axes.axvline(x, color="grey", ls=":", lw=1.2, label=name)
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel=label, title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x:g}" if x < 1e4 else f"{x / 1e3:g}k"
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("share of answers that are right")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_positions(
    plan: Plan, answers: dict[str, Answers], folder: Path, name: str
) -> str:
    """Accuracy by position, at the geometric middle of each bin; the file's name."""
    figure, grid = new_axes()
    curves = {}
    for config, each in answers.items():
        bins = [b for b in position_bins(plan, each.tokens) if b[1] <= each.tokens]
        curves[config] = [
            ((max(start, end / 4) * end) ** 0.5, between(each.by_position, start, end))
            for start, end in bins
        ]
    draw(grid[0, 0], curves)
    finish(
        grid[0, 0],
        "Questions about a text that goes on",
        "position in the text (tokens)",
        {"trained length": plan.trained},
    )
    return save_figure(figure, folder, name)


def plot_distances(
    plan: Plan, answers: dict[str, Answers], folder: Path, name: str
) -> str:
    """Accuracy by distance; the file's name."""
    figure, grid = new_axes()
    curves = {
        config: [(float(d), at(each.by_distance, d)) for d in plan.distances]
        for config, each in answers.items()
    }
    draw(grid[0, 0], curves)
    finish(
        grid[0, 0],
        "How far back the fact stands",
        "distance from fact to question (lines)",
        {f"a cache of {plan.capacity:,} tokens": plan.window_lines},
    )
    return save_figure(figure, folder, f"{name}_distance")


def counts(plan: Plan, answers: Answers) -> dict[str, Any]:
    """Right answers and questions, for the JSON file."""

    def pair(outcomes: list[Outcome]) -> list[int]:
        return [sum(o.right for o in outcomes), len(outcomes)]

    return {
        "by_position": [
            [start, end, *pair(between(answers.by_position, start, end))]
            for start, end in position_bins(plan, answers.tokens)
        ],
        "by_distance": [
            [distance, *pair(at(answers.by_distance, distance))]
            for distance in plan.distances
        ],
    }
