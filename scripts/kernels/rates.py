# SPDX-License-Identifier: Apache-2.0
"""Times of calls, and what memory and arithmetic allow at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from kernels.cases import Case
from kernels.shapes import SHAPES
from sink_paged.huge_pages import clear_to_huge_pages


def measure(
    ours: Callable[[], None], peer: Callable[[], None], seconds: float
) -> dict[str, float]:
    """Median times (us) of ours and its peer in turns, and their ratio's spread."""
    for call in (ours, peer, ours, peer):
        call()
    begin = time.perf_counter()
    ours()
    peer()
    repeats = max(2, min(50, int(0.002 / (time.perf_counter() - begin))))
    pairs: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(pairs) < 7 or time.perf_counter() < stop:
        times = []
        for call in (ours, peer):
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times.append((time.perf_counter() - begin) / repeats * 1e6)
        pairs.append((times[0], times[1]))
    ratios = sorted(ours / peer for ours, peer in pairs)
    return {
        "ours_us": statistics.median(ours for ours, _ in pairs),
        "peer_us": statistics.median(peer for _, peer in pairs),
        "ratio": statistics.median(ratios),
        "ratio_p10": ratios[len(ratios) // 10],
        "ratio_p90": ratios[-1 - len(ratios) // 10],
    }


class Rates:
    """Rates of this machine on torch's threads, each measured when first asked for."""

    def __init__(self, dtype: torch.dtype, huge_pages: bool) -> None:
        """Of matrix products of `dtype`, of memory in huge pages or not."""
        self._huge_pages = huge_pages
        self._bandwidths: dict[int, float] = {}
        self.operations = max(_product_rate(dtype), _product_rate(torch.float32))

    def bandwidth(self, nbytes: int) -> float:
        """Bytes/s of reading about `nbytes` again and again."""
        size = 1 << max(18, (nbytes - 1).bit_length())
        if size not in self._bandwidths:
            memory = torch.zeros(size // 4, dtype=torch.int32)
            if self._huge_pages:
                clear_to_huge_pages(memory)
            memory.add_(1)
            repeats = max(3, (1 << 28) // size)
            seconds = fastest(memory.max, min(repeats, 200))
            self._bandwidths[size] = size / seconds
        return self._bandwidths[size]


def _product_rate(dtype: torch.dtype) -> float:
    """Operations/s of a large matrix product."""
    matrix = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / fastest(lambda: matrix @ matrix, 8)


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def floor_us(case: Case, rates: Rates) -> float:
    """Lower bound of a call's time, see ``bench_attention.py``."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    element = case.cache_dtype.itemsize
    if not case.resident:
        element += case.query_dtype.itemsize
    keys = case.batch * (case.tokens + max(0, case.resident - 1))
    nbytes = keys * 2 * kv_heads * head_size * element
    operations = 4 * case.batch * case.tokens * case.resident * heads * head_size
    return max(nbytes / rates.bandwidth(nbytes), operations / rates.operations) * 1e6
