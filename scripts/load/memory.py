# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a server's processes over the tokens it has written.

It is judged over the second half of the tokens, when caches, pools and the largest
batches have been seen. Buffers of a step come and go by megabytes, for seconds: so a
line is fitted to the medians of twentieths. The growth along it must not exceed the
noise, which is what those would move by without a leak: the spread of their residuals
about the line (two standard deviations either way), and at least an arena of CPython's
allocator, because memory is taken and given back in such pieces. As the residuals may
still depend on each other, their spread is taken as it is, not divided by the root of
their number as for a standard error. Over fewer tokens than ``LEAST_TOKENS`` nothing is
judged, as what a server warms up by is still felt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
PARTS = 20
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
            "ok": self.ok,
        }


def fit(tokens: Sequence[int], rss: Sequence[int], begin: int, end: int) -> Growth:
    """The growth of a process between two numbers of written tokens.

    Args:
        tokens: written when a sample was taken.
        rss: the samples, in bytes.
        begin: tokens from which samples count.
        end: tokens up to which they do.

    Raises:
        ValueError: fewer than three parts of the range have a sample.
    """
    edges = np.linspace(begin, end, PARTS + 1)[1:-1]
    part = np.searchsorted(edges, tokens, side="right")
    x, y = np.array(tokens, dtype=float), np.array(rss, dtype=float)
    inside = (x >= begin) & (x <= end)
    parts = [inside & (part == number) for number in range(PARTS)]
    medians = [(np.median(x[p]), np.median(y[p])) for p in parts if p.any()]
    if len(medians) < 3:
        raise ValueError("too few samples of memory to fit a line")
    at, level = np.array(medians).T
    slope, intercept = np.polyfit(at, level, 1)
    spread = SPREADS * float(np.std(level - (slope * at + intercept), ddof=2))
    reach = float(np.ptp(x[inside]))
    return Growth(
        float(slope),
        float(intercept),
        float(slope) * reach,
        max(spread, float(ARENA_BYTES)),
        spread,
        int(reach),
        int(inside.sum()),
    )


def judge_memory(samples: Samples, output_tokens: int) -> dict[str, Growth]:
    """Growth of every lasting process over the second half of so many tokens.

    Returns:
        By role; nothing if that half has fewer tokens than ``LEAST_TOKENS``.

    Raises:
        ValueError: there are too few samples.
    """
    half = output_tokens // 2
    if half < LEAST_TOKENS:
        return {}
    return {
        role: fit(samples.tokens, samples.rss[role], half, output_tokens)
        for role in LASTING
        if role in samples.rss
    }
