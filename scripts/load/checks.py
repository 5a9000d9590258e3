# SPDX-License-Identifier: Apache-2.0
"""Checks that fail: they are added to a result, which is kept whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import httpx
import psutil

from load.faults import FaultError
from load.server import ServerError
from load.watch import leftovers

Failed = list[tuple[str, str]]
"""Names of checks that failed, and why."""
ORDINARY = (
    FaultError,
    ServerError,
    aiohttp.ClientError,
    httpx.HTTPError,
    psutil.Error,
    LookupError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What a server that fails, or an answer that is not as expected, leads to."""
OURS, STOCK = "sink eviction", "stock vLLM"
"""Engines whose processes are killed."""


@contextmanager
def reported(check: str, failed: Failed) -> Iterator[None]:
    """Makes an ordinary error in the block a failed check."""
    try:
        yield
    except ORDINARY as error:
        failed.append((check, f"{type(error).__name__}: {error}"))


def leaks(phase: str, metrics: dict[str, float]) -> Failed:
    """What an idle server still holds after a phase."""
    held = leftovers(metrics).items()
    return [("leak", f"after the {phase}: {what} is {value}") for what, value in held]


def compare_exit_statuses(
    faults: list[dict[str, Any]], failed: Failed
) -> dict[str, bool | None]:
    """Whether a server of ours ends as one of stock vLLM does.

    Args:
        faults: outcomes of kills, with their ``engine``, ``killed`` and
            ``exit_status``.
        failed: where differences are added.

    Returns:
        By the role of the killed process; None where only one of the engines, or none,
        lost it.
    """
    same: dict[str, bool | None] = {}
    for role in ("worker", "engine core"):
        killed = [fault for fault in faults if fault["killed"] == role]
        statuses = {fault["engine"]: fault["exit_status"] for fault in killed}
        compared = statuses.keys() >= {OURS, STOCK}
        same[role] = statuses[OURS] == statuses[STOCK] if compared else None
        if same[role] is False:
            why = f"exit statuses {statuses}"
            failed.append((f"{role} killed, as stock vLLM", why))
    return same
