# SPDX-License-Identifier: Apache-2.0
"""Attention of a query tile to sinks and a range of keys, chunk by chunk.

As in FlashAttention: the logits of a chunk, their exponentials under a running maximum,
the weighted sum of values. A row of logits or weights is `[keys | sinks]`, each from a
multiple of 16. A decode waits for memory, so what is read next is always asked for
early, across the items of a thread too; pages are laid out as in `cpu`.
"""

from numba import types

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    CACHE_KIND,
    GROUP,
    HEAD_SIZE,
)
from sink_paged.attention.matmul import FEW_ROWS, multiply
from sink_paged.attention.online_softmax import update_softmax
from sink_paged.attention.pages import (
    add_value_tile,
    find_page,
    find_values,
    list_pages,
    prefetch_values,
)
from sink_paged.attention.simd import (
    element_size,
    jit,
    load_i64,
    pair_size,
)
from sink_paged.attention.tiles import multiply_tiles

CHUNK = 256  # keys that share one softmax update
SINK_COLUMNS = 32  # sinks behind them; or a matrix tile may end there
WEIGHT_COLUMNS = CHUNK + SINK_COLUMNS
LONG_CHUNK = 1024  # of few rows, in the same memory
LONG_COLUMNS = LONG_CHUNK + SINK_COLUMNS
MAX_PAGES = LONG_CHUNK // 16 + 1  # of a chunk; the first may be entered in the middle
PAGES_SIZE = 16 * MAX_PAGES  # bytes, sinks' pages too


@jit
def _multiply_keys(
    args: int,
    pages: int,
    offset: int,
    count: int,
    query: int,
    rows: int,
    tiles: int,
    row_columns: int,
    spare: int,
    logits: int,
    after: int,
) -> None:
    """Products of query rows and `count` keys from `offset` in the first of `pages`.

    What is read next, in the end at `after`, is asked for early.
    """
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    kind = load_i64(args + CACHE_KIND)
    element, pair = element_size(kind), pair_size(kind)
    key_tile = 16 * head_size * element
    keys = load_i64(pages) + offset // 16 * key_tile
    while count > 0:
        run = min(block_size - offset, count)
        vectors = (run + 15) // 16
        count, offset, pages = count - run, types.int64(0), pages + 8
        following = load_i64(pages) if count > 0 else after
        if tiles:
            multiply_tiles(
                query,
                2 * head_size,
                keys,
                64,
                key_tile,
                1024,
                logits,
                4 * row_columns,
                tiles,
                vectors,
                head_size // 32,
                0,
                following,
                key_tile,
            )
        else:
            multiply(
                kind,
                query,
                4 * head_size,
                keys,
                16 * element * pair,
                key_tile,
                logits,
                4 * row_columns,
                rows,
                vectors,
                head_size,
                0,
                spare,
                following,
                key_tile,
            )
        logits += 4 * run
        keys = following


@jit
def _add_values(
    args: int,
    pages: int,
    offset: int,
    count: int,
    skipped: int,
    rows: int,
    tiles: int,
    row_columns: int,
    weights: int,
    spare: int,
    sums: int,
    after: int,
) -> None:
    """Add `count` weighted values from `offset` in the first of `pages`.

    No row attends the first `skipped`. The keys that are read next lie at `after`.
    """
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    kind = load_i64(args + CACHE_KIND)
    element, pair = element_size(kind), pair_size(kind)
    strip = 16 * block_size * element
    values = find_values(args, load_i64(pages), offset)
    while count > 0:
        run = min(block_size - offset, count)
        count, offset, pages = count - run, types.int64(0), pages + 8
        following, stride = after, 16 * run * element
        if count > 0:
            following, stride = find_values(args, load_i64(pages), offset), strip
        if tiles:
            done = types.int64(0)
            # Zero times a NaN is a NaN: tokens that no row attends are not multiplied.
            if skipped > 0:
                last = min(run, 32)
                first = min(skipped, last)
                add_value_tile(
                    weights,
                    2 * row_columns,
                    values,
                    strip,
                    first,
                    last,
                    tiles,
                    head_size,
                    spare,
                    sums,
                )
                done = last
            whole = (run - done) // 32
            if whole > 0:
                multiply_tiles(
                    weights + 2 * done,
                    2 * row_columns,
                    values + 32 * done,
                    64,
                    strip,
                    1024,
                    sums,
                    4 * head_size,
                    tiles,
                    head_size // 16,
                    whole,
                    1,
                    following,
                    stride,
                )
                done += 32 * whole
            if done < run:
                add_value_tile(
                    weights + 2 * done,
                    2 * row_columns,
                    values + 32 * done,
                    strip,
                    types.int64(0),
                    run - done,
                    tiles,
                    head_size,
                    spare,
                    sums,
                )
        else:
            multiply(
                kind,
                weights,
                4 * row_columns,
                values,
                16 * element * pair,
                strip,
                sums,
                4 * head_size,
                rows,
                head_size // 16,
                run,
                1,
                spare,
                following,
                stride,
            )
        skipped -= run
        weights += 2 * run if tiles else 4 * run
        values = following


@jit
def _attend_chunk(
    args: int,
    request: int,
    kv_head: int,
    position: int,
    rows: int,
    sink_begin: int,
    sink_end: int,
    key_begin: int,
    begin: int,
    end: int,
    sink_query: int,
    query: int,
    tiles: int,
    row_columns: int,
    weights: int,
    weights_half: int,
    spare: int,
    pages: int,
    sums: int,
    state: int,
    following: int,
) -> None:
    """Add the keys `[begin, end)` and the sinks `[sink_begin, sink_end)` to a softmax.

    Keys before `key_begin` are not attended.
    """
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    element = element_size(load_i64(args + CACHE_KIND))
    keys, sinks = end - begin, sink_end - sink_begin
    sink_column = (keys + 15) & -16
    columns = sink_column + ((sinks + 15) & -16)
    sink_weights, sink_pages = weights + 4 * sink_column, pages + 8 * MAX_PAGES
    offset, sink_offset = types.int64(0), types.int64(0)
    if keys > 0:
        offset = list_pages(args, request, kv_head, begin, end, pages)
        first_values = find_values(args, load_i64(pages), offset)
    else:
        first_values = following
    if sinks > 0:
        sink_offset = list_pages(
            args, request, kv_head, sink_begin, sink_end, sink_pages
        )
        if keys > 0:
            values = find_values(args, load_i64(sink_pages), sink_offset)
            in_page = min(sinks, block_size - sink_offset)
            strip = 16 * block_size * element
            prefetch_values(values, strip, head_size // 16, 16 * in_page * element)
    if keys > 0:
        _multiply_keys(
            args,
            pages,
            offset,
            keys,
            query,
            rows,
            tiles,
            row_columns,
            spare,
            weights,
            load_i64(sink_pages) if sinks > 0 else first_values,
        )
    if sinks > 0:
        _multiply_keys(
            args,
            sink_pages,
            sink_offset,
            sinks,
            sink_query,
            rows,
            tiles,
            row_columns,
            spare,
            sink_weights,
            first_values,
        )
    update_softmax(
        args,
        position,
        kv_head * load_i64(args + GROUP),
        rows,
        sink_begin,
        sink_end,
        begin,
        end,
        sink_column,
        columns + 16 if tiles else columns,  # a matrix tile may end there
        row_columns,
        weights,
        weights_half,
        sums,
        state,
    )
    if tiles:
        weights = weights_half
        sink_weights = weights_half + 2 * sink_column
    if sinks > 0:
        _add_values(
            args,
            sink_pages,
            sink_offset,
            sinks,
            types.int64(0),
            rows,
            tiles,
            row_columns,
            sink_weights,
            spare,
            sums,
            first_values,
        )
    if keys > 0:
        _add_values(
            args,
            pages,
            offset,
            keys,
            key_begin - begin,
            rows,
            tiles,
            row_columns,
            weights,
            spare,
            sums,
            following,
        )


@jit
def attend_keys(
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
    tiles: int,
    weights: int,
    weights_half: int,
    spare: int,
    pages: int,
    sums: int,
    state: int,
    following: int,
) -> None:
    """Add the sinks `[0, sink_end)` and the keys `[key_begin, key_end)` to a softmax.

    `following` is where the keys lie that this thread reads next.
    """
    block_size = load_i64(args + BLOCK_SIZE)
    # Chunks of whole pages, or at least of whole vectors or matrix tiles of a page.
    align = 32 if tiles and block_size % 32 == 0 else 16
    span, row_columns = types.int64(CHUNK), types.int64(WEIGHT_COLUMNS)
    if rows <= FEW_ROWS and tiles == 0:
        span, row_columns = types.int64(LONG_CHUNK), types.int64(LONG_COLUMNS)
    if block_size <= span:
        span -= span % block_size
    sink_begin, begin = types.int64(0), key_begin - key_begin % align
    while sink_begin < sink_end or begin < key_end:
        # A few sinks share the softmax of the first chunk.
        is_apart = tiles != 0 or sink_end - sink_begin > SINK_COLUMNS
        chunk_end, sink_stop = begin, sink_end
        if sink_begin < sink_end and is_apart:
            sink_stop = min(sink_begin + span, sink_end)
        else:
            chunk_end = max(begin, min(begin - begin % span + span, key_end))
        after = following
        if chunk_end < key_end:
            after = find_page(args, request, kv_head, chunk_end)
        _attend_chunk(
            args,
            request,
            kv_head,
            position,
            rows,
            sink_begin,
            sink_stop,
            key_begin,
            begin,
            chunk_end,
            sink_query,
            query,
            tiles,
            row_columns,
            weights,
            weights_half,
            spare,
            pages,
            sums,
            state,
            after,
        )
        sink_begin, begin = sink_stop, chunk_end
