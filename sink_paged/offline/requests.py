# SPDX-License-Identifier: Apache-2.0
"""Reads and validates the lines of the input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from sink_paged.offline.lines import Done, Failure, LineId, PromptKind, Request
from sink_paged.offline.progress import report

PROMPT_KEYS: tuple[PromptKind, ...] = get_args(PromptKind)
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
# Checked here because a wrong type or an integer beyond the engine's width gets past
# vLLM's own check and then takes the whole engine down instead of one line.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, INT32_MAX),
    "min_tokens": (int, 0, INT32_MAX),
    "top_k": (int, -1, INT32_MAX),
    "seed": (int, 0, INT64_MAX),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "repetition_penalty": (float, 0, 1e6),
}
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
SAMPLING_KEYS = (*NUMBERS, *FLAGS, "stop", "stop_token_ids")


class RequestReader:
    """Reads the input lazily, in order.

    Attributes:
        line_of: where each id that was met stands first.
    """

    def __init__(self, lines: Iterable[bytes], done: set[LineId]) -> None:
        """Read ``lines``; ``done`` are the ids that earlier runs finished."""
        self.line_of: dict[LineId, int] = {}
        self._lines = lines
        self._done = done
        self._ignored: set[str] = set()

    def __iter__(self) -> Iterator[Request | Failure | Done]:
        """Yield one item for each line that is not blank."""
        for line, raw in enumerate(self._lines, 1):
            if raw.strip():
                yield self._read(line, raw)

    def _read(self, line: int, raw: bytes) -> Request | Failure | Done:
        line_id: LineId = line
        try:
            record = load_object(raw)
            line_id = read_id(line, record)
            first = self.line_of.setdefault(line_id, line)
            if first != line:
                raise ValueError(f"duplicate id {line_id!r}, first on line {first}")
            if line_id in self._done:
                return Done(line, line_id)
            request = parse_request(line, line_id, record)
        except ValueError as error:
            return Failure(line, line_id, str(error))
        self._warn_of_ignored(line, record)
        return request

    def _warn_of_ignored(self, line: int, record: dict[str, Any]) -> None:
        """Name each key that has no effect once: it may be a misspelt setting."""
        known = {*PROMPT_KEYS, *SAMPLING_KEYS, "id"}
        for key in record.keys() - known - self._ignored:
            self._ignored.add(key)
            report(f"warning: line {line}: key {key!r} is ignored, here and later")


def load_object(raw: bytes) -> dict[str, Any]:
    """Decode a line that must hold one JSON object; raises ``ValueError``."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    return record


def is_id(value: Any) -> bool:
    """Text or an integer; JSON's true and false are ints in Python, but no ids."""
    return isinstance(value, str) or type(value) is int


def read_id(line: int, record: dict[str, Any]) -> LineId:
    """Return a line's id, by default its number; raises ``ValueError``."""
    line_id = record.get("id")
    if line_id is None:
        return line
    if not is_id(line_id):
        raise ValueError(f"id must be text or an integer, got {line_id!r}")
    return line_id


def parse_line(line: int, raw: bytes) -> Request:
    """Read a line on its own; raises ``ValueError``."""
    record = load_object(raw)
    return parse_request(line, read_id(line, record), record)


def parse_request(line: int, line_id: LineId, record: dict[str, Any]) -> Request:
    """Check what a line asks for; raises ``ValueError`` saying what is wrong."""
    given = [key for key in PROMPT_KEYS if record.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of {', '.join(PROMPT_KEYS)} is needed, got "
            f"{', '.join(given) or 'none'}"
        )
    (kind,) = given
    _check_prompt(kind, record[kind])
    sampling = {
        key: record[key] for key in SAMPLING_KEYS if record.get(key) is not None
    }
    check_sampling(sampling)
    return Request(line, line_id, kind, record[kind], sampling)


def _check_prompt(kind: PromptKind, prompt: Any) -> None:
    if kind == "prompt":
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text, got {type(prompt).__name__}")
    elif kind == "prompt_token_ids":
        if not prompt or not _are_token_ids(prompt):
            raise ValueError("prompt_token_ids must be a list of token ids, not empty")
    elif not prompt or not _are_messages(prompt):
        raise ValueError("messages must be a list of objects with a role, not empty")


def check_sampling(sampling: dict[str, Any]) -> None:
    """Refuse sampling settings of the wrong type or range; raises ``ValueError``."""
    for key, value in sampling.items():
        if key in NUMBERS:
            _check_number(key, value)
        elif key in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        elif key == "stop_token_ids" and not _are_token_ids(value):
            raise ValueError(f"{key} must be a list of token ids, got {value!r}")
        elif key == "stop":
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"stop must be text or a list of it, got {value!r}")


def _check_number(key: str, value: Any) -> None:
    kind, low, high = NUMBERS[key]
    if type(value) not in (int, kind) or not low <= value <= high:
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{key} must be {noun} from {low} to {high}, got {value!r}")


def _are_token_ids(value: Any) -> bool:
    """Whether the engine, which holds them in int32, can take this."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= INT32_MAX for item in value
    )


def _are_messages(value: Any) -> bool:
    """Whether this looks like a chat; the template judges the contents."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) for item in value
    )
