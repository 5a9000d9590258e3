# SPDX-License-Identifier: Apache-2.0
"""What came of the workloads so far: measurements, and why others are missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streams.workload import Workload


@dataclass(frozen=True)
class Problem:
    """Why there is no measurement.

    Attributes:
        kind: ``skipped``, for what the peer cannot do, or ``failed``.
        reason: for the user.
        peer: its name.
        window: tokens; None where the peer cannot run at all, as is ``streams`` then.
        streams: of the workload.
        repetition: counted from 0; None for what is skipped, which holds for all.
    """

    kind: str
    reason: str
    peer: str
    window: int | None = None
    streams: int | None = None
    repetition: int | None = None

    def __str__(self) -> str:
        """For a terminal."""
        where = self.peer
        if self.window is not None:
            where += f", window {self.window}, {self.streams} streams"
        if self.repetition is not None:
            where += f", repetition {self.repetition}"
        return f"{where} {self.kind}: {self.reason}"


class Outcomes:
    """Outcomes of the workloads of a run, in the order of their ends.

    Args:
        model: its name for the reader of the measurements.
        folder: of the results; files in it are named from there.
    """

    def __init__(self, model: str, folder: Path) -> None:
        """Start empty."""
        self.model, self.folder = model, folder
        self.measurements: list[dict[str, Any]] = []
        self.problems: list[Problem] = []

    def skips(self, workload: Workload) -> bool:
        """Whether the peer is known to be unable to do it."""
        cell = workload.window, workload.streams
        return any(
            problem.kind == "skipped"
            and problem.peer == workload.peer
            and (problem.window, problem.streams) in (cell, (None, None))
            for problem in self.problems
        )

    def add(self, workload: Workload, repetition: int, message: dict[str, Any]) -> str:
        """Take over what ``streams.launch.measure`` returned; a line about it."""
        peer, window, streams = workload.peer, workload.window, workload.streams
        if "result" not in message:
            kind = "skipped" if "skipped" in message else "failed"
            reason = message[kind].replace(f"{self.folder}/", "")
            if kind == "failed":
                problem = Problem(kind, reason, peer, window, streams, repetition)
            elif message.get("everywhere"):
                problem = Problem(kind, reason, peer)
            else:
                problem = Problem(kind, reason, peer, window, streams)
            self.problems.append(problem)
            return str(problem)
        result = message["result"]
        settings = asdict(workload) | {"model": self.model, "repetition": repetition}
        del settings["scratch"]
        self.measurements.append(settings | result)
        rate, gap = result["output_throughput"], result["median_itl_ms"]
        estimate = " (cut: estimate for whole texts)" if result["extrapolated"] else ""
        return (
            f"{peer}, window {window}, {streams} streams: {rate:.4g} tokens/s{estimate}"
            f", {gap:.4g} ms"
        )
