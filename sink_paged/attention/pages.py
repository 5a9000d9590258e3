# SPDX-License-Identifier: Apache-2.0
"""Where a key lies in the cache, and the parts of a page that need care."""

from numba import types

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    CACHE,
    CACHE_BLOCK,
    CACHE_HEAD,
    CACHE_KIND,
    COLUMNS,
    HEAD_SIZE,
    PINNED,
    TABLE,
    TABLE_ROW,
)
from sink_paged.attention.simd import (
    copy_masked,
    element_size,
    jit,
    load_i32,
    load_i64,
    prefetch,
    store_i64,
    zero_row,
)
from sink_paged.attention.tiles import multiply_tiles


@jit
def find_slot(args: int, key: int) -> tuple[int, int]:
    """Column of the block table that holds text position `key`, and offset there."""
    block_size, pinned = load_i64(args + BLOCK_SIZE), load_i64(args + PINNED)
    block = key // block_size
    offset = key - block * block_size
    if block < pinned:
        return block, offset
    ring = load_i64(args + COLUMNS) - pinned
    return pinned + (block - pinned) % ring, offset


@jit
def next_column(args: int, column: int) -> int:
    """Column of the block behind that in `column`."""
    column += 1
    return column if column < load_i64(args + COLUMNS) else load_i64(args + PINNED)


@jit
def page_in_column(args: int, request: int, kv_head: int, column: int) -> int:
    """Address of the page in a column of a request's block table."""
    row = load_i64(args + TABLE) + request * load_i64(args + TABLE_ROW)
    number = types.int64(load_i32(row + 4 * column))
    return (
        load_i64(args + CACHE)
        + number * load_i64(args + CACHE_BLOCK)
        + kv_head * load_i64(args + CACHE_HEAD)
    )


@jit
def find_page(args: int, request: int, kv_head: int, key: int) -> int:
    """Address of the page that holds text position `key`."""
    column, _ = find_slot(args, key)
    return page_in_column(args, request, kv_head, column)


@jit
def find_values(args: int, page: int, offset: int) -> int:
    """Address in a page of the values from token `offset` on, in the first strip."""
    block_size, head_size = load_i64(args + BLOCK_SIZE), load_i64(args + HEAD_SIZE)
    element = element_size(load_i64(args + CACHE_KIND))
    return page + (block_size * head_size + 16 * offset) * element


@jit
def list_pages(
    args: int, request: int, kv_head: int, begin: int, end: int, pages: int
) -> int:
    """Write where the pages of the keys `[begin, end)` lie, 8 bytes each, to `pages`.

    Returns the offset of key `begin` in the first of them.
    """
    block_size = load_i64(args + BLOCK_SIZE)
    column, offset = find_slot(args, begin)
    key = begin - offset
    while key < end:
        store_i64(pages, page_in_column(args, request, kv_head, column))
        pages += 8
        key += block_size
        column = next_column(args, column)
    return offset


@jit
def prefetch_values(values: int, strip: int, strips: int, nbytes: int) -> None:
    """Ask early for the first `nbytes` of every strip."""
    for n in range(strips):
        for line in range(0, nbytes, 64):
            prefetch(values + n * strip + line)


@jit
def gather_values(
    values: int, strip: int, strips: int, count: int, target: int, target_strip: int
) -> None:
    """Copy `count` bfloat16 values, from an even one, of every strip.

    The second of a last pair becomes 0: it may be a slot that was never written.
    """
    for n in range(strips):
        source, line = values + n * strip, target + n * target_strip
        for pair in range(count // 2):
            copy_masked(source + 64 * pair, line + 64 * pair, types.int32(-1))
        if count % 2 != 0:
            at = 64 * (count // 2)
            copy_masked(source + at, line + at, types.int32(0xFFFF))


@jit
def add_value_tile(
    weights_half: int,
    weights_row: int,
    values: int,
    strip: int,
    first: int,
    last: int,
    tiles: int,
    head_size: int,
    spare: int,
    sums: int,
) -> None:
    """Add the tokens `[first, last)` of 32; the others are not read, or ignored."""
    strips = head_size // 16
    for line in range(16):
        bits = 0
        if first <= 2 * line < last:
            bits |= 0xFFFF
        if first <= 2 * line + 1 < last:
            bits |= -0x10000
        for n in range(strips):
            target = spare + 1024 * n + 64 * line
            if bits == 0:
                zero_row(target, 0, 16)
            else:
                copy_masked(values + n * strip + 64 * line, target, types.int32(bits))
    multiply_tiles(
        weights_half,
        weights_row,
        spare,
        64,
        1024,
        1024,
        sums,
        4 * head_size,
        tiles,
        strips,
        1,
        1,
        spare,
        1024,
    )
