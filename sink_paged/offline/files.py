# SPDX-License-Identifier: Apache-2.0
"""Input and output files by their ending: JSON lines, or Parquet where it is .parquet.

A Parquet row is read as the JSON line that it stands for, and written at the end of a
run from the JSON lines that the run appended to: a Parquet file cannot grow row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sink_paged.offline.requests import PROMPT_KEYS, SAMPLING_KEYS
from sink_paged.offline.results import UnusableError, replacing

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 64
ROW_GROUP_BYTES = 16 << 20


def is_parquet(path: Path) -> bool:
    """Whether ``path`` is to be read or written as Parquet."""
    return path.suffix == ".parquet"


def records_path(output: Path) -> Path:
    """Where a run appends its records: ``output`` itself, or beside a Parquet file.

    Raises:
        UnusableError: a Parquet file stands there without the records of its run.
    """
    if not is_parquet(output):
        return output
    records = output.with_name(output.name + ".jsonl")
    if output.exists() and not records.exists():
        raise UnusableError(
            f"{output} exists without {records}, which a run of this script keeps; "
            "name another output"
        )
    return records


def count_lines(path: Path) -> int:
    """Lines of the input that are not blank.

    Raises:
        UnusableError: it cannot be read.
    """
    if is_parquet(path):
        with _open_parquet(path) as file:
            return int(file.metadata.num_rows)
    try:
        with path.open("rb") as lines:
            return sum(1 for raw in lines if raw.strip())
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error}") from error


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the input's lines in order, holding little of it in memory."""
    if is_parquet(path):
        yield from _read_parquet(path)
    else:
        with path.open("rb") as lines:
            yield from lines


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UnusableError(f"{path}: Parquet needs pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UnusableError(f"{path} is not Parquet: {error}") from error
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error}") from error


def _read_parquet(path: Path) -> Iterator[bytes]:
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        known = [n for n in names if n in {*PROMPT_KEYS, *SAMPLING_KEYS, "id"}]
        # Named, so that they are warned of, but not read.
        others = dict.fromkeys(set(names) - set(known))
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=known):
            for row in batch.to_pylist() if known else [{}] * batch.num_rows:
                yield _encode(path, _without_nulls(row) | others)


def _encode(path: Path, row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row).encode() + b"\n"
    except TypeError as error:
        raise UnusableError(f"{path} holds what JSON cannot: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Drop a struct's null fields: Parquet's way to say that a key is absent."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def write_parquet(records: Path, path: Path) -> None:
    """Write the records of a closed output to ``path``, replacing it in one step.

    Ids become text if one of them is text or wider than 64 bits.
    """
    import pyarrow
    import pyarrow.parquet

    schema = _schema(records)
    id_type = schema.field("id").type

    def row(record: dict[str, Any]) -> dict[str, Any]:
        if pyarrow.types.is_string(id_type):
            record["id"] = str(record["id"])
        return {name: _clean(value) for name, value in record.items()}

    with (
        replacing(path) as partial,
        pyarrow.parquet.ParquetWriter(partial, schema) as writer,
        records.open("rb") as lines,
    ):
        while group := lines.readlines(ROW_GROUP_BYTES):
            rows = [row(json.loads(raw)) for raw in group]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))


def _schema(records: Path) -> pyarrow.Schema:
    import pyarrow

    token_ids, wide = False, False
    with records.open("rb") as lines:
        for raw in lines:
            record = json.loads(raw)
            token_ids = token_ids or "token_ids" in record
            wide = wide or not _is_int64(record["id"])
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens")
    return pyarrow.schema(
        [
            ("id", pyarrow.string() if wide else pyarrow.int64()),
            ("line", pyarrow.int64()),
            ("text", pyarrow.string()),
            *([("token_ids", pyarrow.list_(pyarrow.int32()))] if token_ids else ()),
            ("finish_reason", pyarrow.string()),
            *((name, pyarrow.int64()) for name in counts),
            ("error", pyarrow.string()),
        ]
    )


def _is_int64(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _clean(value: Any) -> Any:
    """Text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value
