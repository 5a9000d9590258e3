# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a process and of those it started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil


def reset_peaks() -> None:
    """Forget the peaks of this process tree so far, those of start-up."""
    for process in _tree():
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Sum of the peaks (``VmHWM``) of this process tree, in bytes.

    The peaks of processes need not fall together and shared pages count in each: an
    upper bound.
    """
    return sum(_peak(process.pid) for process in _tree())


def _tree() -> Iterator[psutil.Process]:
    this = psutil.Process()
    yield this
    yield from this.children(recursive=True)


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
