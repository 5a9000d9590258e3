# SPDX-License-Identifier: Apache-2.0
"""The server-sent events of a streamed answer, line by line."""

from __future__ import annotations

import json
from typing import Any

DATA = b"data:"
DONE = b"[DONE]"


class EventError(Exception):
    """The server sent an error, or what is no event, in place of the answer."""


def event(line: bytes | str) -> dict[str, Any] | None:
    """What a line of the stream says; None for blanks, comments and ``[DONE]``.

    Raises:
        EventError: the line says that the request failed, or is not readable.
    """
    raw = line.encode() if isinstance(line, str) else line
    data = raw.removeprefix(DATA).strip()
    if not raw.startswith(DATA) or not data or data == DONE:
        return None
    try:
        found = json.loads(data)
    except ValueError as error:
        raise EventError(f"an event is not JSON: {data[:100]!r}") from error
    if not isinstance(found, dict):
        raise EventError(f"an event is no object: {data[:100]!r}")
    if "error" in found:
        raise EventError(f"the server sent {found['error']}")
    return found
