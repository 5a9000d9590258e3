# SPDX-License-Identifier: Apache-2.0
"""The model runner's state of a stream, which does not grow with its text.

``enable_streams`` replaces the two buffers of vLLM's runner that are sized by the
longest text: the block table becomes a ring of columns, the token rows are memory that
is only committed where a stream has written.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.v1.worker.block_table import BlockTable

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.kv_cache import SinkWindowSpec
from sink_paged.window import BlockWindow

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# Python names this flag from 3.13 on; the number is Linux's on x86 and Arm.
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


class RingBlockTable(BlockTable):
    """A block table whose columns are used again as blocks are evicted.

    Block ``k`` of a text stands in column ``k`` while it is pinned, else in
    ``pinned + (k - pinned) % ring``. ``num_blocks_per_row`` counts the text's blocks.
    """

    pinned: int

    @classmethod
    def adopt(cls, table: BlockTable, policy: BlockWindow) -> RingBlockTable:
        """Take over the buffers of ``table``."""
        ring = cls.__new__(cls)
        ring.__dict__.update(table.__dict__)
        ring.pinned = policy.pinned_blocks
        return ring

    @property
    def ring(self) -> int:
        """Columns behind the pinned ones."""
        return int(self.max_num_blocks_per_req) - self.pinned

    def append_row(self, block_ids: list[int], row_idx: int) -> None:
        """Add the text's next blocks; only the last ring of them can still be read."""
        start = int(self.num_blocks_per_row[row_idx])
        end = start + len(block_ids)
        row = self.block_table.np[row_idx]
        pinned = block_ids[: max(0, self.pinned - start)]
        row[start : start + len(pinned)] = pinned
        first = max(start + len(pinned), end - self.ring)
        blocks = np.arange(first, end)
        columns = self.pinned + (blocks - self.pinned) % self.ring
        row[columns] = block_ids[first - start :]
        self.num_blocks_per_row[row_idx] = end

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: Tensor, positions: Tensor
    ) -> None:
        """Slots of the step's tokens: as stock, at the position of the ring column."""
        block = positions // self.block_size
        column = torch.where(
            block < self.pinned, block, self.pinned + (block - self.pinned) % self.ring
        )
        ring_positions = column * self.block_size + positions % self.block_size
        super().compute_slot_mapping(num_reqs, query_start_loc, ring_positions)


class TokenRows:
    """Token ids of the running streams, in rows that cost what is written to them.

    Address space is reserved for the longest text; the system commits a page when it
    is first written and takes it back when its row is released.

    Attributes:
        ids: int32 ``[num_rows, ROW_TOKENS]``, zero where nothing was written.
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

    def release(self, first: int, end: int) -> None:
        """Give the memory of rows ``[first, end)`` back; they read as zero."""
        if first < end:
            start, length = first * self._row_bytes, (end - first) * self._row_bytes
            self._buffer.madvise(mmap.MADV_DONTNEED, start, length)


def enable_streams(runner: GPUModelRunner) -> TokenRows:
    """Let the requests of ``runner`` grow past ``max_model_len``.

    Called once its KV cache is initialised.

    Returns:
        The rows of its input batch, to be released as requests leave it.
    """
    batch = runner.input_batch
    rows = TokenRows(batch.max_num_reqs)
    batch.token_ids_cpu = rows.ids
    batch.token_ids_cpu_tensor = torch.from_numpy(batch.token_ids_cpu)
    # Prompt embeddings are refused, so every entry is True: one byte stands for all.
    batch.is_token_ids = np.lib.stride_tricks.as_strided(
        np.ones(1, dtype=np.bool_), batch.token_ids_cpu.shape, (0, 0)
    )
    batch.max_model_len = runner.max_model_len = MAX_STREAM_TOKENS
    tables = batch.block_table.block_tables
    for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        assert isinstance(spec, SinkWindowSpec)
        tables[index] = RingBlockTable.adopt(tables[index], spec.blocks)
    return rows
