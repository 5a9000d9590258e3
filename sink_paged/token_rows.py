# SPDX-License-Identifier: Apache-2.0
"""Token ids of the running streams, in rows that cost what has still to be read.

Stands in for ``InputBatch.token_ids_cpu``, which vLLM sizes by the longest text. A row
is addressed by text position, but only its live part is in memory: tokens that the
model has read are given back to the system, page by page::

    [0, first) read and released      [first, end) live      [end, ROW_TOKENS) untouched
"""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sink_paged.config import MAX_STREAM_TOKENS

# Python names this flag from 3.13 on; the number is Linux's on x86 and Arm.
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)

TRIM_TOKENS = 1 << 14
"""A row's read tokens are released in pieces of this many (64 KiB) or more."""


class LiveTokens(NamedTuple):
    """The live part of a row, on its way to another row.

    Attributes:
        first: text position of its first token.
        ids: int32 ``[end - first]``.
    """

    first: int
    ids: npt.NDArray[np.int32]

    def copy(self) -> LiveTokens:
        """The same tokens, in memory of their own."""
        return LiveTokens(self.first, self.ids.copy())


class TokenRows:
    """Rows of token ids that answer the few indexings of vLLM's input batch.

    Address space is reserved for the longest text; the system commits a page when it
    is first written and takes it back when it has been read.

    Attributes:
        ids: int32 ``[num_rows, ROW_TOKENS]``, for gathering; zero where released.
        tensor: the same memory.
        looks_back: tokens that stay live after they were read.
    """

    ROW_TOKENS = MAX_STREAM_TOKENS + 1  # a power of two: rows start on a page

    def __init__(self, num_rows: int) -> None:
        """Reserve ``num_rows`` rows.

        Raises:
            MemoryError: when the system does not let address space be reserved.
        """
        self._row_bytes = self.ROW_TOKENS * np.dtype(np.int32).itemsize
        size = num_rows * self._row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._buffer = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise MemoryError(
                f"sink eviction reserves {size >> 30} GiB of address space (not "
                f"memory) for the token ids of {num_rows} streams, and was refused: "
                f"{error}. Allow it (ulimit -v unlimited, vm.overcommit_memory 0 or 1) "
                "or lower --max-num-seqs"
            ) from error
        # Huge pages would commit 2 MiB at the first token of every row.
        self._buffer.madvise(mmap.MADV_NOHUGEPAGE)
        self.ids: npt.NDArray[np.int32] = np.frombuffer(
            self._buffer, dtype=np.int32
        ).reshape(num_rows, self.ROW_TOKENS)
        self.tensor = torch.from_numpy(self.ids)
        self.looks_back = 0
        self._first = np.zeros(num_rows, dtype=np.int64)
        self._end = np.zeros(num_rows, dtype=np.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_rows, ROW_TOKENS)``."""
        num_rows, row_tokens = self.ids.shape
        return num_rows, row_tokens

    def begin(self, row: int, first: int) -> None:
        """Give ``row`` to a stream that will be read from position ``first`` on."""
        self._move_in(row, max(0, first - self.looks_back))

    def _move_in(self, row: int, first: int) -> None:
        self.release(row, row + 1)
        self._first[row] = self._end[row] = first

    def tails(
        self, ends: npt.NDArray[np.int32], length: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The last tokens of the first rows.

        Args:
            ends: of each row, the tokens of its text.
            length: tokens of a tail at most; no more than ``looks_back``.

        Returns:
            Token ids, int32 ``[len(ends), length]``, and how many of them a row has.
        """
        tails = np.zeros((len(ends), length), dtype=np.int32)
        lengths = np.zeros(len(ends), dtype=np.int32)
        for row, end in enumerate(ends):
            start = max(int(self._first[row]), int(end) - length)
            lengths[row] = end - start
            tails[row, : lengths[row]] = self.ids[row, start:end]
        return tails, lengths

    def __getitem__(self, key: tuple[int, slice]) -> LiveTokens:
        """The live part of a row, whatever the slice."""
        row, _ = key
        first = int(self._first[row])
        return LiveTokens(first, self.ids[row, first : self._end[row]])

    def __setitem__(self, key: tuple[int, slice], tokens: Any) -> None:
        """Write token ids at the text positions of a slice, or move a live part in.

        Args:
            key: row and slice of text positions.
            tokens: a sequence as long as the slice, of which what lies before the
                row's live part is ignored; or ``LiveTokens``, which replace the row.
        """
        row, span = key
        if isinstance(tokens, LiveTokens):
            self._move_in(row, tokens.first)
            start, stop = tokens.first, tokens.first + len(tokens.ids)
            self.ids[row, start:stop] = tokens.ids
        else:
            begin, stop = span.start or 0, span.stop
            start = max(begin, int(self._first[row]))
            if start >= stop:
                return
            self.ids[row, start:stop] = tokens[start - begin :]
        self._end[row] = max(stop, self._end[row])

    def trim(self, num_read: npt.NDArray[np.int32]) -> None:
        """Release what the model has read: ``num_read[row]`` tokens of each row."""
        behind = num_read - self.looks_back - self._first[: len(num_read)]
        for row in np.flatnonzero(behind >= TRIM_TOKENS):
            first = int(num_read[row]) - self.looks_back
            start = int(self._first[row]) * 4 // mmap.PAGESIZE * mmap.PAGESIZE
            stop = first * 4 // mmap.PAGESIZE * mmap.PAGESIZE
            self._first[row] = first
            self._buffer.madvise(
                mmap.MADV_DONTNEED, int(row) * self._row_bytes + start, stop - start
            )

    def release(self, first_row: int, end_row: int) -> None:
        """Give the memory of rows ``[first_row, end_row)`` back."""
        for row in range(first_row, end_row):
            first, end = int(self._first[row]), int(self._end[row])
            start = first * 4 // mmap.PAGESIZE * mmap.PAGESIZE
            if first < end:
                self._buffer.madvise(
                    mmap.MADV_DONTNEED, row * self._row_bytes + start, 4 * end - start
                )
            self._first[row] = self._end[row] = 0
