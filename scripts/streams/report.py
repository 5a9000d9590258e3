# SPDX-License-Identifier: Apache-2.0
"""What a measuring process says to the script that started it: lines of JSON."""

from __future__ import annotations

import json
import os
import time
from typing import Any

INTERVAL = 0.2
"""Seconds between two messages of progress."""


class SkippedError(Exception):
    """A peer cannot do a workload.

    Args:
        reason: why, for the user.
        everywhere: whether it can do no other workload of this run either.
    """

    def __init__(self, reason: str, everywhere: bool = False) -> None:
        """See the class."""
        super().__init__(reason)
        self.everywhere = everywhere


class Report:
    """Writes messages into a pipe.

    ``{"phase": NAME, "total": TOKENS}`` begins a phase, ``{"tokens": COUNT}`` advances
    it; the last message is ``{"result": ...}``, ``{"skipped": REASON, "everywhere":
    BOOL}`` or ``{"failed": REASON}``.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over a file descriptor."""
        # A child of this process that has it open would keep the reader waiting.
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "w", buffering=1)
        self._pending, self._sent = 0, 0.0

    def send(self, **message: Any) -> None:
        """Write one message."""
        self._pipe.write(json.dumps(message) + "\n")

    def phase(self, name: str, total: int = 0) -> None:
        """Begin a phase of ``total`` tokens, 0 if unknown."""
        self._flush()
        self.send(phase=name, total=total)

    def tokens(self, count: int) -> None:
        """Advance the phase."""
        self._pending += count
        if time.monotonic() - self._sent > INTERVAL:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self.send(tokens=self._pending)
        self._pending, self._sent = 0, time.monotonic()
