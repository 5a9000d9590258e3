# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a server's processes over the tokens it has written.

It is judged over the second half of the tokens, when caches, pools and the largest
batches have been seen. A line is fitted; the growth along it must not exceed the noise,
which is what RSS would move by without a leak: the spread of the residuals about the
line (two standard deviations either way), and at least an arena of CPython's allocator
for each Python process, because memory is taken and given back in such pieces. The
residuals follow each other in steps, not independently: so their spread is taken as it
is, not divided by the root of their number as for a standard error. Over fewer tokens
than ``LEAST_TOKENS`` nothing is judged, as what a server warms up by is still felt.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from load.server import Server

LASTING = ("API server", "engine core", "worker")
"""Roles of the processes that are there from start to end."""
ARENA_BYTES = 1 << 20
"""Of CPython 3.10 and later."""
LEAST_TOKENS = 100_000
SPREADS = 4.0
"""Width of the residuals' spread in standard deviations."""


@dataclass
class Samples:
    """RSS by role at numbers of written tokens.

    Attributes:
        tokens: written when a sample was taken.
        rss: bytes by role, all processes of a role together.
        processes: most processes seen at once.
    """

    tokens: list[int] = field(default_factory=list)
    rss: dict[str, list[int]] = field(default_factory=dict)
    processes: int = 0

    def take(self, server: Server, tokens: int) -> None:
        """Add a sample of every process of the server."""
        now: dict[str, int] = {}
        processes = 0
        for role, members in server.processes().items():
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    now[role] = now.get(role, 0) + process.memory_info().rss
                    processes += 1
        for role in now.keys() | self.rss.keys():
            series = self.rss.setdefault(role, [0] * len(self.tokens))
            series.append(now.get(role, 0))
        self.tokens.append(tokens)
        self.processes = max(self.processes, processes)

    def total(self) -> list[int]:
        """Of all processes, sample by sample."""
        return [sum(values) for values in zip(*self.rss.values(), strict=True)]


@dataclass(frozen=True)
class Growth:
    """A line fitted to memory over tokens.

    Attributes:
        bytes_per_token: its slope.
        intercept: its value at no tokens, in bytes.
        grown: bytes along the line, from the first sample to the last.
        noise: bytes that RSS moves by without a leak.
        spread: the part of ``noise`` that the residuals show.
        tokens: from the first sample to the last.
        samples: how many.
    """

    bytes_per_token: float
    intercept: float
    grown: float
    noise: float
    spread: float
    tokens: int
    samples: int

    @property
    def judged(self) -> bool:
        """Whether there are tokens enough to say so."""
        return self.tokens >= LEAST_TOKENS

    @property
    def ok(self) -> bool:
        """Whether nothing grew beyond the noise."""
        return self.grown <= self.noise

    def to_json(self) -> dict[str, Any]:
        """A flat mapping."""
        return {
            "bytes_per_token": self.bytes_per_token,
            "intercept_bytes": self.intercept,
            "grown_bytes": self.grown,
            "noise_bytes": self.noise,
            "residual_spread_bytes": self.spread,
            "detectable_bytes_per_token": self.noise / self.tokens,
            "tokens": self.tokens,
            "samples": self.samples,
            "judged": self.judged,
            "ok": self.ok,
        }


def fit(tokens: list[int], rss: list[int], begin: int, end: int, arenas: int) -> Growth:
    """The growth between two numbers of written tokens.

    Args:
        tokens: written when a sample was taken.
        rss: the samples, in bytes.
        begin: tokens from which samples count.
        end: tokens up to which they do.
        arenas: Python processes that the samples are of.

    Raises:
        ValueError: fewer than three samples, or all at one number of tokens.
    """
    inside = [begin <= count <= end for count in tokens]
    x = np.array(tokens, dtype=float)[inside]
    y = np.array(rss, dtype=float)[inside]
    if len(x) < 3 or not np.ptp(x):
        raise ValueError("too few samples of memory to fit a line")
    slope, intercept = np.polyfit(x, y, 1)
    spread = SPREADS * float(np.std(y - (slope * x + intercept), ddof=2))
    reach = float(np.ptp(x))
    return Growth(
        float(slope),
        float(intercept),
        float(slope) * reach,
        max(spread, float(arenas * ARENA_BYTES)),
        spread,
        int(reach),
        len(x),
    )
