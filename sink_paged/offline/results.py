# SPDX-License-Identifier: Apache-2.0
"""The output file: what is finished in it, appending whole lines, the input's order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sink_paged.offline.lines import Failure, LineId, Result
from sink_paged.offline.requests import is_id, load_object


class UnusableError(Exception):
    """The run as a whole cannot start: wrong arguments or a foreign output file."""


class Output:
    """The output file, open for appending; an earlier run's is taken over.

    What that run finished stays. Its failures go, as they are tried again, and so does
    a line that it was killed while writing.

    Attributes:
        done: ids that earlier runs finished.
    """

    def __init__(self, path: Path, *, token_ids: bool = False) -> None:
        """Open ``path``; ``token_ids``: records hold the output's token ids too.

        Raises:
            UnusableError: the file holds something that no earlier run wrote, or
                cannot be read or written.
        """
        self.done: set[LineId] = set()
        self._token_ids = token_ids
        try:
            if path.exists():
                self._take_over(path)
            self._file = path.open("ab")
        except OSError as error:
            raise UnusableError(f"the output cannot be used: {error}") from error

    def __enter__(self) -> Self:
        """Return the output, to be closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self._file.close()

    def write(self, outcome: Result | Failure) -> None:
        """Append one record and hand it to the system at once."""
        if isinstance(outcome, Result):
            record = _result_record(outcome, self._token_ids)
        else:
            record = {
                "id": outcome.id,
                "line": outcome.line,
                "error": outcome.message,
            }
        text = json.dumps(record, ensure_ascii=False)
        # A lone surrogate has no UTF-8; its backslash form is what JSON writes for it.
        self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def _take_over(self, path: Path) -> None:
        if not path.is_file():
            raise UnusableError(f"{path} is not a regular file")
        keep_all = True
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if _is_half_written(raw):
                    keep_all = False
                    continue
                record = _load_record(path, number, raw)
                if "error" in record:
                    keep_all = False
                else:
                    self.done.add(record["id"])
        if not keep_all:
            _replace(path, _finished_lines(path))


def sort_output(path: Path, line_of: dict[LineId, int]) -> None:
    """Bring a closed output into the input's order, holding only offsets in memory.

    Args:
        path: the file.
        line_of: where each id stands in the input, which may have gained lines since
            an earlier run wrote its records.
    """
    places: list[tuple[int, int]] = []
    with path.open("rb") as file:
        offset = 0
        for raw in file:
            record = json.loads(raw)
            line = record["line"]
            # A failure is of this run; if it is a duplicate, its id stands elsewhere.
            if "error" not in record:
                line = line_of.get(record["id"], line)
            places.append((line, offset))
            offset += len(raw)
        ordered = sorted(places)
        if ordered != places:

            def lines() -> Iterator[bytes]:
                for _, start in ordered:
                    file.seek(start)
                    yield file.readline()

            _replace(path, lines())


def _result_record(result: Result, token_ids: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": result.request.id,
        "line": result.request.line,
        "text": result.text,
    }
    if token_ids:
        record["token_ids"] = result.token_ids
    return record | {
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "cached_tokens": result.cached_tokens,
    }


def _load_record(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        record = load_object(raw)
        if is_id(record.get("id")) and type(record.get("line")) is int:
            return record
    except ValueError:
        pass
    raise UnusableError(
        f"line {number} of {path} is no record of an earlier run; name another output"
    )


def _is_half_written(raw: bytes) -> bool:
    """Whether a run was killed while it wrote this line, as ``Output`` writes it."""
    start = b'{"id": '
    return not raw.endswith(b"\n") and (raw.startswith(start) or start.startswith(raw))


def _finished_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n") and "error" not in json.loads(raw):
                yield raw


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file in one step, so that no kill can lose a finished line.

    Yields:
        The path to write its new contents to.
    """
    path = path.resolve()
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        file.writelines(lines)
