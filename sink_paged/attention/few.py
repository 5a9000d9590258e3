# SPDX-License-Identifier: Apache-2.0
"""Attention of up to 16 query rows, as of a decode, on matrix tiles; pages as in `cpu`.

The keys of a span share one softmax update, the sinks that of the last span. A row of
logits or weights is `[keys in whole matrix tiles | the rest of the keys | sinks]`, the
last two each from a multiple of 16; their values are gathered in a buffer, so that
slots that were never written are not multiplied (zero times a NaN is a NaN). What is
read next is always asked for early, across the items of a thread too.

A segment describes the keys of a span that lie in one page, see `_list_segments`.
"""

from numba import types

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    GROUP,
    HEAD_SIZE,
)
from sink_paged.attention.online_softmax import update_softmax
from sink_paged.attention.pages import (
    find_page,
    find_slot,
    find_values,
    gather_values,
    next_column,
    page_in_column,
    prefetch_values,
)
from sink_paged.attention.simd import (
    jit,
    load_i64,
    store_i64,
    zero_row,
)
from sink_paged.attention.tiles import accumulate_tiles, multiply_tiles

SPAN = 1024  # keys that share one softmax update
ROW_COLUMNS = SPAN + 64
MAX_SINKS = 32

# A segment: its values for `accumulate_tiles`, then its keys.
VALUES, STRIP, TILES, WEIGHTS, AHEAD, AHEAD_STRIP, KEYS, KEY_VECTORS = range(0, 64, 8)
SEGMENT = 64
SEGMENTS_SIZE = SEGMENT * (SPAN // 32 + 2)


@jit
def _list_segments(
    args: int,
    request: int,
    kv_head: int,
    begin: int,
    end: int,
    weights: int,
    segments: int,
) -> int:
    """List the segments of the keys `[begin, end)`; their number, `begin` 32-aligned.

    `TILES` counts whole tiles of 32 values, 0 in a segment of fewer.
    """
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    column, offset = find_slot(args, begin)
    key, segment = begin, segments
    while key < end:
        run = min(block_size - offset, end - key)
        page = page_in_column(args, request, kv_head, column)
        values = find_values(args, page, offset)
        store_i64(segment + VALUES, values)
        store_i64(segment + STRIP, 32 * block_size)
        store_i64(segment + TILES, run // 32)
        store_i64(segment + WEIGHTS, weights + 2 * (key - begin))
        store_i64(segment + AHEAD_STRIP, 32 * block_size)
        store_i64(segment + KEYS, page + 2 * offset * head_size)
        store_i64(segment + KEY_VECTORS, (run + 15) // 16)
        if key > begin:
            store_i64(segment - SEGMENT + AHEAD, values)
        key += run
        segment += SEGMENT
        offset, column = types.int64(0), next_column(args, column)
    # The next two strips of the first page.
    store_i64(segment - SEGMENT + AHEAD, load_i64(segments) + 64 * block_size)
    return (segment - segments) // SEGMENT


@jit
def _multiply_keys(
    args: int, query: int, segments: int, count: int, logits: int, after: int
) -> None:
    """Products of query rows and the keys of segments; then what is read `after`."""
    head_size = load_i64(args + HEAD_SIZE)
    key_tile = 32 * head_size
    for n in range(count):
        segment = segments + n * SEGMENT
        vectors = load_i64(segment + KEY_VECTORS)
        following, stride = after, types.int64(0)
        if n + 1 < count:
            following, stride = load_i64(segment + SEGMENT + KEYS), key_tile
        multiply_tiles(
            query,
            2 * head_size,
            load_i64(segment + KEYS),
            64,
            key_tile,
            1024,
            logits,
            4 * ROW_COLUMNS,
            1,
            vectors,
            head_size // 32,
            0,
            following,
            stride,
        )
        logits += 64 * vectors


@jit
def _attend_span(
    args: int,
    request: int,
    kv_head: int,
    position: int,
    rows: int,
    sink_end: int,
    begin: int,
    end: int,
    sink_query: int,
    query: int,
    weights: int,
    weights_half: int,
    spare: int,
    segments: int,
    sums: int,
    state: int,
    following: int,
) -> None:
    """Add the keys `[begin, end)` and the sinks `[0, sink_end)` to a softmax."""
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    group = load_i64(args + GROUP)
    strips, strip = head_size // 16, 32 * block_size
    whole = (end - begin) & -32
    tail = end - begin - whole
    sink_column = whole + ((tail + 15) & -16)
    columns = (sink_column + sink_end + 31) & -32
    # The first segment is that of the gathered values.
    listed = segments + SEGMENT
    count = types.int64(0)
    if end > begin:
        count = _list_segments(args, request, kv_head, begin, end, weights_half, listed)
    last = segments + count * SEGMENT
    first_values = load_i64(listed + VALUES) if whole > 0 else following
    tail_values = load_i64(last + VALUES) + 1024 * load_i64(last + TILES)
    if tail > 0:
        prefetch_values(tail_values, strip, strips, 32 * tail)
    sink_page, after = first_values, first_values
    if sink_end > 0:
        sink_page = find_page(args, request, kv_head, types.int64(0))
        sink_values = find_values(args, sink_page, types.int64(0))
        prefetch_values(sink_values, strip, strips, 32 * sink_end)
        after = sink_page
    _multiply_keys(args, query, listed, count, weights, after)
    if sink_end > 0:
        multiply_tiles(
            sink_query,
            2 * head_size,
            sink_page,
            64,
            32 * head_size,
            1024,
            weights + 4 * sink_column,
            4 * ROW_COLUMNS,
            1,
            (sink_end + 15) // 16,
            head_size // 32,
            0,
            first_values,
            strip,
        )
    update_softmax(
        args,
        position,
        kv_head * group,
        rows,
        types.int64(0),
        sink_end,
        begin,
        end,
        sink_column,
        columns,
        types.int64(ROW_COLUMNS),
        weights,
        weights_half,
        sums,
        state,
    )
    if count > 0 and load_i64(last + TILES) == 0:
        count -= 1
        if count > 0:
            store_i64(last - SEGMENT + AHEAD, first_values + 2 * strip)
    begin_segment = listed
    if columns > whole:
        tiles = (columns - whole) // 32
        zero_row(spare, types.int64(0), 256 * tiles * strips)
        if tail > 0:
            gather_values(tail_values, strip, strips, tail, spare, 1024 * tiles)
        if sink_end > 0:
            target = spare + 32 * (sink_column - whole)
            gather_values(sink_values, strip, strips, sink_end, target, 1024 * tiles)
        store_i64(segments + VALUES, spare)
        store_i64(segments + STRIP, 1024 * tiles)
        store_i64(segments + TILES, tiles)
        store_i64(segments + WEIGHTS, weights_half + 2 * whole)
        store_i64(segments + AHEAD, spare)
        store_i64(segments + AHEAD_STRIP, 1024 * tiles)
        begin_segment = segments
        count += 1
    accumulate_tiles(
        2 * ROW_COLUMNS,
        begin_segment,
        count,
        strips,
        sums,
        4 * head_size,
        following,
        32 * head_size,
    )


@jit
def attend_few(
    args: int,
    request: int,
    kv_head: int,
    position: int,
    rows: int,
    sink_end: int,
    key_begin: int,
    key_end: int,
    sink_query: int,
    query: int,
    weights: int,
    weights_half: int,
    spare: int,
    segments: int,
    sums: int,
    state: int,
    following: int,
) -> None:
    """Add the sinks `[0, sink_end)` and the keys `[key_begin, key_end)` to a softmax.

    `following` is where the keys lie that this thread reads next.
    """
    block_size = load_i64(args + BLOCK_SIZE)
    begin = key_begin & -32
    while True:
        end = begin + SPAN
        if end < key_end and block_size < SPAN:
            end -= end % block_size
        end = max(min(end, key_end), begin)
        is_last = end >= key_end
        _attend_span(
            args,
            request,
            kv_head,
            position,
            rows,
            sink_end if is_last else types.int64(0),
            begin,
            end,
            sink_query,
            query,
            weights,
            weights_half,
            spare,
            segments,
            sums,
            state,
            following if is_last else types.int64(spare),
        )
        if is_last:
            return
        begin = end
