# SPDX-License-Identifier: Apache-2.0
"""The kernel of sink attention: work items, their memory and their order.

A work item is a (request, kv head, query tile, part of the keys); the rows of a tile
are its tokens times the query heads that share the kv head. Threads draw items from a
shared counter. Keys are split into parts only where there are fewer items than threads;
the thread that finishes the last part of a tile merges them.

A tile attends the window, and under the query's second rotation the sinks that have
left it.
"""

from numba import types

from sink_paged.attention.arguments import (
    ARRIVALS,
    BLOCK_SIZE,
    CACHE_KIND,
    GROUP,
    HEAD_SIZE,
    ITEM,
    KV_HEADS,
    MATRIX_TILES,
    MAX_ROWS,
    PARTIAL_BYTES,
    PARTIALS,
    RECENT,
    REQUESTS,
    ROTATION,
    SCRATCH,
    SCRATCH_BYTES,
    SEQ_LENS,
    SINK_LOGITS,
    SINKS,
    STARTS,
    THREAD,
    THREADS,
    TILE_TOKENS,
)
from sink_paged.attention.chunk import (
    CHUNK,
    LONG_COLUMNS,
    PAGES_SIZE,
    WEIGHT_COLUMNS,
    attend_keys,
)
from sink_paged.attention.few import (
    MAX_SINKS,
    ROW_COLUMNS,
    SEGMENTS_SIZE,
    attend_few,
)
from sink_paged.attention.matmul import COPIED_VECTORS, FEW_ROWS
from sink_paged.attention.pages import find_slot, page_in_column
from sink_paged.attention.rows import (
    merge_parts,
    read_query,
    write_output,
)
from sink_paged.attention.simd import (
    LOG2_E,
    element_size,
    fetch_add,
    jit,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i64,
    zero_row,
)
from sink_paged.attention.tiles import (
    begin_tiles,
    end_tiles,
)

MIN_PART = 128  # keys below which a part is not worth merging


def scratch_size(max_rows: int, head_size: int) -> int:
    """Bytes of scratch memory that a thread needs, see `_attend_tile`."""
    # Many rows of a chunk hold few rows of a longer one.
    few_rows = max(16 * ROW_COLUMNS, FEW_ROWS * LONG_COLUMNS)
    assert max_rows * WEIGHT_COLUMNS >= few_rows
    assert PAGES_SIZE <= SEGMENTS_SIZE  # which lie in the same place
    # Copies of `multiply` lie where matrix tiles have weights and gathered values.
    spare = max_rows * 2 * WEIGHT_COLUMNS + 128 * head_size
    assert spare >= 32 * COPIED_VECTORS * max(head_size, CHUNK)
    per_row = 16 * head_size + 6 * WEIGHT_COLUMNS + 8
    return (max_rows * per_row + 128 * head_size + SEGMENTS_SIZE + 64 + 63) // 64 * 64


@jit
def _attend_tile(
    args: int,
    request: int,
    kv_head: int,
    first_token: int,
    num_tokens: int,
    item: int,
    parts: int,
    scratch: int,
    following: int,
) -> None:
    """Attention of `num_tokens` tokens of a request from `first_token`.

    `following` is where the keys of the thread's next tile lie.
    """
    head_size, max_rows = load_i64(args + HEAD_SIZE), load_i64(args + MAX_ROWS)
    sinks, recent = load_i64(args + SINKS), load_i64(args + RECENT)
    group = load_i64(args + GROUP)
    sink_logits = load_i64(args + SINK_LOGITS)
    rows, part = num_tokens * group, item % parts
    starts = load_i64(args + STARTS) + 4 * request
    end_row = types.int64(load_i32(starts + 4))
    first_row = types.int64(load_i32(starts)) + first_token
    seq_len = types.int64(load_i32(load_i64(args + SEQ_LENS) + 4 * request))
    position = seq_len - end_row + first_row
    last = position + num_tokens - 1

    tile_config, query = scratch, scratch + 64
    sink_query = query + max_rows * 4 * head_size
    sums = sink_query + max_rows * 4 * head_size
    weights = sums + max_rows * 4 * head_size
    weights_half = weights + max_rows * 4 * WEIGHT_COLUMNS
    spare = weights_half + max_rows * 2 * WEIGHT_COLUMNS
    segments = spare + 128 * head_size
    state = segments + SEGMENTS_SIZE
    if parts > 1:
        sums = load_i64(args + PARTIALS) + item * load_i64(args + PARTIAL_BYTES)
        state = sums + max_rows * 4 * head_size

    tiles = types.int64(0)
    if load_i64(args + MATRIX_TILES) != 0:
        tiles = (rows + 15) // 16
        begin_tiles(tile_config, min(rows, 16))
    else:
        spare, weights_half = weights_half, types.int64(0)
    few = tiles == 1 and load_i64(args + BLOCK_SIZE) % 32 == 0 and sinks <= MAX_SINKS
    sink_end = types.int64(0)
    if part == 0:
        sink_end = max(min(sinks, last - recent), 0)
    rotate = load_i64(args + ROTATION) != 0 and sink_end > 0
    read_query(args, first_row, kv_head, rows, tiles, rotate, query, sink_query, spare)
    for row in range(rows):
        logit, total = types.float32(-1e30), types.float32(0)
        if sink_logits != 0 and part == 0:
            head = kv_head * group + row % group
            logit = load_f32(sink_logits + 4 * head) * types.float32(LOG2_E)
            total = types.float32(1)
        store_f32(state + 8 * row, logit)
        store_f32(state + 8 * row + 4, total)
        zero_row(sums + row * 4 * head_size, 0, head_size)

    key_begin, key_end = max(position - recent, 0), last + 1
    if parts > 1:
        share = (key_end - key_begin + parts - 1) // parts
        first = key_begin + part * share
        if part > 0:
            key_begin = min(first - first % 32, key_end)
        if part + 1 < parts:
            key_end = min(first + share - (first + share) % 32, key_end)
    if few:
        attend_few(
            args,
            request,
            kv_head,
            position,
            rows,
            sink_end,
            key_begin,
            key_end,
            sink_query if rotate else query,
            query,
            weights,
            weights_half,
            spare,
            segments,
            sums,
            state,
            following,
        )
    else:
        attend_keys(
            args,
            request,
            kv_head,
            position,
            rows,
            sink_end,
            key_begin,
            key_end,
            sink_query if rotate else query,
            query,
            tiles,
            weights,
            weights_half,
            spare,
            segments,
            sums,
            state,
            following,
        )
    if parts > 1:
        arrivals = load_i64(args + ARRIVALS) + 8 * (item // parts)
        if fetch_add(arrivals, 1) + 1 < parts:
            return
        store_i64(arrivals, 0)
        sums -= part * load_i64(args + PARTIAL_BYTES)
        state -= part * load_i64(args + PARTIAL_BYTES)
        merge_parts(args, sums, parts, rows)
    write_output(args, first_row, kv_head, rows, sums, state)


@jit
def _count_parts(args: int) -> int:
    """Parts into which the keys of each tile are split."""
    threads, tile_tokens = load_i64(args + THREADS), load_i64(args + TILE_TOKENS)
    if load_i64(args + REQUESTS) * load_i64(args + KV_HEADS) >= threads:
        return types.int64(1)
    starts, items = load_i64(args + STARTS), types.int64(0)
    for request in range(load_i64(args + REQUESTS)):
        start = load_i32(starts + 4 * request)
        num_tokens = types.int64(load_i32(starts + 4 * request + 4) - start)
        items += (num_tokens + tile_tokens - 1) // tile_tokens
    items *= load_i64(args + KV_HEADS)
    most = load_i64(args + RECENT) // MIN_PART
    if items == 0 or items >= threads or most == 0:
        return types.int64(1)
    return min((threads + items - 1) // items, most)


@jit
def _draw(args: int, item: int) -> int:
    """The next work item of a thread whose last was `item`."""
    if load_i64(args + THREADS) == 1:
        return item + 1
    return fetch_add(args + ITEM, 1)


@jit
def _find_following(
    args: int, request: int, item: int, first_item: int, per_head: int
) -> int:
    """Where the window's keys of item `item` lie, if it is a decode in sight.

    `first_item` is the first of `request`, which has `per_head` for each kv head.
    """
    num_kv_heads = load_i64(args + KV_HEADS)
    if item >= first_item + per_head * num_kv_heads:
        first_item += per_head * num_kv_heads
        request += 1
    if request >= load_i64(args + REQUESTS):
        return types.int64(0)
    starts = load_i64(args + STARTS) + 4 * request
    num_tokens = types.int64(load_i32(starts + 4) - load_i32(starts))
    kv_head = item - first_item
    if num_tokens != 1 or kv_head >= num_kv_heads:
        return types.int64(0)
    last = types.int64(load_i32(load_i64(args + SEQ_LENS) + 4 * request)) - 1
    key = max(last - load_i64(args + RECENT), 0) & -32
    column, offset = find_slot(args, key)
    page = page_in_column(args, request, kv_head, column)
    element = element_size(load_i64(args + CACHE_KIND))
    return page + offset * load_i64(args + HEAD_SIZE) * element


@jit
def attend(args: int) -> None:
    """Body of one thread: draw work items until none is left.

    A thread draws a decode's successor early, to ask for its keys meanwhile.
    """
    num_requests, num_kv_heads = load_i64(args + REQUESTS), load_i64(args + KV_HEADS)
    tile_tokens, starts = load_i64(args + TILE_TOKENS), load_i64(args + STARTS)
    thread, parts = fetch_add(args + THREAD, 1), _count_parts(args)
    scratch = load_i64(args + SCRATCH) + thread * load_i64(args + SCRATCH_BYTES)
    request, first_item = types.int64(0), types.int64(0)
    store_i64(scratch, 0)  # no tile configuration yet
    use_tiles = load_i64(args + MATRIX_TILES) != 0
    item = _draw(args, types.int64(-1))
    while request < num_requests:
        start = load_i32(starts + 4 * request)
        num_tokens = types.int64(load_i32(starts + 4 * request + 4) - start)
        tiles = (num_tokens + tile_tokens - 1) // tile_tokens
        if item >= first_item + tiles * num_kv_heads * parts:
            first_item += tiles * num_kv_heads * parts
            request += 1
            continue
        local = (item - first_item) // parts
        kv_head, token = local // tiles, local % tiles * tile_tokens
        is_early = num_tokens == 1 and parts == 1
        following, next_item = types.int64(0), types.int64(0)
        if is_early:
            next_item = _draw(args, item)
            following = _find_following(args, request, next_item, first_item, tiles)
        _attend_tile(
            args,
            request,
            kv_head,
            token,
            min(tile_tokens, num_tokens - token),
            item,
            parts,
            scratch,
            following if following != 0 else scratch,
        )
        item = next_item if is_early else _draw(args, item)
    if use_tiles:
        end_tiles()
