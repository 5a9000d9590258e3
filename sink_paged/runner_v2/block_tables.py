# SPDX-License-Identifier: Apache-2.0
"""Block tables of model runner V2 as rings of columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables

from sink_paged.window import BlockWindow

TOKENS = 256
"""Tokens of a request that a program maps at a time; most have one."""


class RingBlockTables(BlockTables):
    """Block tables whose columns are used again as blocks are evicted.

    Block ``k`` of a text stands in column ``k`` while it is pinned, else in
    ``pinned + (k - pinned) % ring``, for each KV-cache group by its own policy.

    Attributes:
        pinned: pinned columns of each group.
        text_blocks: blocks of the text so far, int64 ``[num_groups, max_num_reqs]``.
        pinned_tensor: ``pinned`` on the device, int32 ``[num_groups]``.
    """

    pinned: list[int]
    text_blocks: npt.NDArray[np.int64]
    pinned_tensor: Tensor

    @classmethod
    def adopt(cls, tables: BlockTables, policies: Sequence[BlockWindow]) -> None:
        """Turn the empty ``tables`` into rings, in place: vLLM holds them elsewhere.

        Args:
            tables: of a runner that has no requests.
            policies: of each KV-cache group.

        Raises:
            ValueError: the kernels' blocks are not the cache's.
        """
        sizes = getattr(tables, "kernel_block_sizes", tables.block_sizes)
        if list(sizes) != list(tables.block_sizes):
            raise ValueError(
                f"sink eviction needs the attention kernels' block sizes {sizes} to be "
                f"those of the KV cache, {tables.block_sizes}"
            )
        tables.__class__ = cls
        tables.pinned = [policy.pinned_blocks for policy in policies]
        tables.text_blocks = np.zeros_like(tables.num_blocks.np, dtype=np.int64)
        tables.pinned_tensor = torch.tensor(
            tables.pinned, dtype=torch.int32, device=tables.device
        )

    def append_block_ids(
        self, req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool
    ) -> None:
        """Add the text's next blocks; only the last ring of them can still be read."""
        for group, block_ids in enumerate(new_block_ids):
            table, pinned = self.block_tables[group], self.pinned[group]
            columns = table.gpu.shape[1]
            ring = columns - pinned
            start = 0 if overwrite else int(self.text_blocks[group, req_index])
            end = start + len(block_ids)
            first = max(start, pinned, end - ring)  # of the others that is kept
            kept = block_ids[first - start :]
            column = pinned + (first - pinned) % ring
            until_wrap = columns - column
            table.stage_write(req_index, start, block_ids[: max(0, pinned - start)])
            table.stage_write(req_index, column, kept[:until_wrap])
            table.stage_write(req_index, pinned, kept[until_wrap:])
            self.text_blocks[group, req_index] = end
            self.num_blocks.np[group, req_index] = min(end, columns)

    def compute_slot_mappings(
        self,
        idx_mapping: Tensor,
        query_start_loc: Tensor,
        positions: Tensor,
        num_tokens_padded: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """Slots of the step's tokens, int64 ``[num_groups, num_tokens_padded]``.

        Padding, also that behind the step's tokens, gets ``PAD_SLOT_ID``.
        """
        slots = self.slot_mappings if out is None else out
        grid = (self.num_kv_cache_groups, idx_mapping.shape[0] + 1)
        ring_slots_kernel[grid](
            slots,
            slots.stride(0),
            slots.shape[1],
            idx_mapping,
            query_start_loc,
            positions,
            self.block_table_ptrs,
            self.block_table_strides,
            self.block_sizes_tensor,
            self.pinned_tensor,
            PAD=PAD_SLOT_ID,
            TOKENS=TOKENS,
        )
        return slots[:, :num_tokens_padded]


@triton.jit
def ring_slots_kernel(  # type: ignore[no-untyped-def]
    slots,
    slots_stride,
    max_num_tokens,
    idx_mapping,
    query_start_loc,
    positions,
    table_ptrs,
    table_columns,
    block_sizes,
    pinned_columns,
    PAD: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
):
    """Slots of one request's tokens in one group; the last program pads the rest."""
    group = tl.program_id(0)
    request = tl.program_id(1)
    slots += group * slots_stride
    start = tl.load(query_start_loc + request)
    end = max_num_tokens
    row = tl.full((), -1, tl.int64)
    if request < tl.num_programs(1) - 1:
        end = tl.load(query_start_loc + request + 1)
        row = tl.load(idx_mapping + request).to(tl.int64)
    if row < 0:  # no request of the scheduler's
        for first in range(start, end, TOKENS):
            token = first + tl.arange(0, TOKENS)
            tl.store(slots + token, PAD, mask=token < end)
        return
    columns = tl.load(table_columns + group)
    block_size = tl.load(block_sizes + group)
    pinned = tl.load(pinned_columns + group)
    table = tl.cast(tl.load(table_ptrs + group), tl.pointer_type(tl.int32))
    table += row * columns
    ring = columns.to(tl.int32) - pinned
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        mask = token < end
        # A text ends before 2^31, and a GPU has no instruction for 64-bit quotients.
        position = tl.load(positions + token, mask=mask, other=0).to(tl.int32)
        block = position // block_size
        column = tl.where(block < pinned, block, pinned + (block - pinned) % ring)
        page = tl.load(table + column, mask=mask, other=0).to(tl.int64)
        tl.store(
            slots + token,
            page * block_size + (position - block * block_size),
            mask=mask,
        )
