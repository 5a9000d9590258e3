# SPDX-License-Identifier: Apache-2.0
"""Texts to evaluate on: files, folders of files, JSON lines."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HELD_OUT = ("argparse", "tarfile", "typing")
"""Modules of the standard library that the bundled models never read."""


def held_out_files() -> list[Path]:
    """Sources of ``HELD_OUT`` in the running Python."""
    modules = map(importlib.import_module, HELD_OUT)
    return [Path(str(module.__file__)) for module in modules]


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Documents of files and folders, in the order of their names.

    A folder stands for the ``.txt`` and ``.jsonl`` files in it, as PG19's ``test``
    with a book a file. A JSON line is a string or an object with ``text``.

    Raises:
        ValueError: naming what cannot be read.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(
                file for file in path.iterdir() if file.suffix in (".txt", ".jsonl")
            )
            if not files:
                raise ValueError(f"there is no .txt or .jsonl file in {path}")
            yield from read_texts(files)
        elif not path.is_file():
            raise ValueError(f"there is no file {path}")
        elif path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield path.read_text(encoding="utf-8", errors="replace")


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                yield entry if isinstance(entry, str) else entry["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: neither a string nor {{"text": ...}} '
                    f"({type(error).__name__}: {error})"
                ) from None


def special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, as a BOS token; may be empty."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer("a")["input_ids"]
    starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return ids[: next(starts, 0)]


def stream_tokens(
    tokenizer: Any, texts: Iterable[str], limit: int | None = None
) -> list[int]:
    """Documents as one stream: joined by line ends, one prefix before them all."""
    tokens = special_prefix(tokenizer)
    for text in texts:
        if limit is not None and len(tokens) >= limit:
            break
        ids = tokenizer(text + "\n", add_special_tokens=False, verbose=False)
        tokens += ids["input_ids"]
    return tokens[:limit]


def add_text_option(parser: argparse.ArgumentParser) -> None:
    """``--text``, by default what the bundled models never read."""
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=held_out_files(),
        metavar="PATH",
        help="text files, .jsonl files with a `text` field, or folders of both (PG19: "
        "its test folder); default: standard library sources",
    )


def positive(names: Sequence[str] = ()) -> Any:
    """A converter of argparse for integers of at least 1, or one of ``names``."""

    def convert(text: str) -> Any:
        if text in names:
            return text
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
        return number

    return convert
