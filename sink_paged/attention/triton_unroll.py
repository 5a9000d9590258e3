# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The Triton kernel that writes the rings of a block table out in the text's order."""

import triton
import triton.language as tl


@triton.jit
def unroll(
    block_table,
    query_start_loc,
    seq_lens,
    unrolled,
    lengths,
    num_columns,
    num_blocks,
    window_tokens,
    table_row,
    pinned: tl.constexpr,
    block_size: tl.constexpr,
    columns: tl.constexpr,
):
    """Blocks and length of a request's window; see `flash.WindowTable`.

    Grid: requests. A request without rows, whose length and table say nothing, gets a
    length of 0.
    """
    request = tl.program_id(0)
    query_len = tl.load(query_start_loc + request + 1)
    query_len -= tl.load(query_start_loc + request)
    seq_len = tl.load(seq_lens + request)
    if query_len <= 0:
        tl.store(lengths + request, 0)
        return
    oldest = tl.maximum(seq_len - query_len - window_tokens, 0)
    first_block = oldest // block_size
    used = seq_len - first_block * block_size
    tl.store(lengths + request, used)
    ring = num_columns - pinned
    first_column = first_block
    if first_block >= pinned:
        first_column = pinned + (first_block - pinned) % ring
    held = tl.cdiv(used, block_size)
    table = block_table + request.to(tl.int64) * table_row
    for begin in range(0, num_blocks, columns):
        block = begin + tl.arange(0, columns)
        column = first_column + block
        column = tl.where(column >= num_columns, column - ring, column)
        number = tl.load(table + column, mask=block < held, other=0)
        tl.store(unrolled + request * num_blocks + block, number, block < num_blocks)
