# SPDX-License-Identifier: Apache-2.0
"""Attention of a query tile to a range of keys, chunk by chunk; pages as in `cpu`.

As in FlashAttention: the logits of a chunk, their exponentials under a running maximum,
the weighted sum of values.
"""

from numba import types

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    CACHE_KIND,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    RECENT,
    SCALE,
    SINKS,
    SLOPES,
    SOFT_CAP,
)
from sink_paged.attention.matmul import (
    multiply,
)
from sink_paged.attention.pages import add_value_tile, find_page, prefetch_page
from sink_paged.attention.simd import (
    LOG2_E,
    element_size,
    jit,
    load_f32,
    load_f64,
    load_i64,
    pair_size,
    scale_row,
    store_f32,
    zero_half_row,
    zero_row,
)
from sink_paged.attention.softmax import (
    exp2,
    exponentials,
    exponentials_bf16,
    general_logits,
    largest_of,
    mask,
)
from sink_paged.attention.tiles import multiply_tiles

CHUNK = 256  # keys that share one softmax update
WEIGHT_COLUMNS = CHUNK + 32  # a matrix tile may begin in a chunk and end behind it


@jit
def _multiply_keys(
    args: int,
    request: int,
    kv_head: int,
    begin: int,
    end: int,
    query: int,
    rows: int,
    tiles: int,
    spare: int,
    logits: int,
) -> None:
    """Products of query rows and the keys `[begin, end)`, `begin` a multiple of 16."""
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    kind = load_i64(args + CACHE_KIND)
    element, pair = element_size(kind), pair_size(kind)
    key_tile = 16 * head_size * element
    key = begin
    while key < end:
        offset = key % block_size
        run = min(block_size - offset, end - key)
        vectors = (run + 15) // 16
        keys = find_page(args, request, kv_head, key) + (offset // 16) * key_tile
        target = logits + 4 * (key - begin)
        if tiles:
            multiply_tiles(
                query,
                2 * head_size,
                keys,
                64,
                key_tile,
                1024,
                target,
                4 * WEIGHT_COLUMNS,
                tiles,
                vectors,
                head_size // 32,
                0,
                keys + vectors * key_tile,
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
                target,
                4 * WEIGHT_COLUMNS,
                rows,
                vectors,
                head_size,
                0,
                spare,
            )
        key += run


@jit
def _update_softmax(
    args: int,
    position: int,
    first_head: int,
    rows: int,
    is_sink: bool,
    begin: int,
    end: int,
    weights: int,
    weights_half: int,
    sums: int,
    state: int,
) -> None:
    """Turn the logits of the keys `[begin, end)` into weights.

    Keys that a row does not attend weigh nothing in it. `weights_half` is where
    bfloat16 weights go, 0 for float32 ones in place.
    """
    group = load_i64(args + HEADS) // load_i64(args + KV_HEADS)
    head_size, slopes = load_i64(args + HEAD_SIZE), load_i64(args + SLOPES)
    sinks, recent = load_i64(args + SINKS), load_i64(args + RECENT)
    scale = types.float32(load_f64(args + SCALE))
    soft_cap = types.float32(load_f64(args + SOFT_CAP))
    slope = types.float32(0.0)
    for row in range(rows):
        i = position + row // group
        if is_sink:
            first, last = types.int64(0), min(sinks, i - recent)
            distance_from = min(i, sinks + recent)
        else:
            first, last = max(i - recent, 0), i + 1
            distance_from = i
        low, high = max(first, begin) - begin, min(last, end) - begin
        logits = weights + row * 4 * WEIGHT_COLUMNS
        half = weights_half + row * 2 * WEIGHT_COLUMNS
        low16, high16 = low & -16, (high + 15) & -16
        if high <= low:
            low16 = high16 = types.int64(0)
        else:
            factor = scale * types.float32(LOG2_E)
            if slopes != 0 or soft_cap > 0:
                if slopes != 0:
                    slope = load_f32(slopes + 4 * (first_head + row % group))
                shift = types.float32(begin - distance_from)
                general_logits(logits, low16, high16, scale, soft_cap, slope, shift)
                factor = types.float32(1)
            if low16 < low:
                mask(logits, low16, low, high)
            if high < high16:
                mask(logits, high16 - 16, low, high)
            largest = largest_of(logits, low16, high16) * factor
            previous = load_f32(state + 8 * row)
            total = load_f32(state + 8 * row + 4)
            if largest > previous:
                decay = exp2(previous - largest)
                store_f32(state + 8 * row, largest)
                scale_row(sums + row * 4 * head_size, head_size, decay)
                total *= decay
            else:
                largest = previous
            if weights_half:
                total += exponentials_bf16(logits, low16, high16, factor, largest, half)
            else:
                total += exponentials(logits, low16, high16, factor, largest)
            store_f32(state + 8 * row + 4, total)
        if weights_half:
            zero_half_row(half, 0, low16)
            # Behind `end` too, where a matrix tile may end.
            zero_half_row(half, high16, end - begin + 16)
        else:
            zero_row(logits, 0, low16)
            zero_row(logits, high16, end - begin)


@jit
def _add_values(
    args: int,
    request: int,
    kv_head: int,
    begin: int,
    end: int,
    key_begin: int,
    rows: int,
    tiles: int,
    weights: int,
    spare: int,
    sums: int,
) -> None:
    """Add the weighted values of the keys `[begin, end)`; none before `key_begin`."""
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    kind = load_i64(args + CACHE_KIND)
    element, pair = element_size(kind), pair_size(kind)
    strip = 16 * block_size * element
    key = begin
    while key < end:
        offset = key % block_size
        run = min(block_size - offset, end - key)
        values = find_page(args, request, kv_head, key)
        values += (block_size * head_size + 16 * offset) * element
        if tiles:
            row = weights + 2 * (key - begin)
            done = types.int64(0)
            # Zero times a NaN is a NaN: tokens that no row attends are not multiplied.
            if key < key_begin:
                last = min(run, 32)
                first = min(key_begin - key, last)
                add_value_tile(
                    row,
                    2 * WEIGHT_COLUMNS,
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
                    row + 2 * done,
                    2 * WEIGHT_COLUMNS,
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
                    values + head_size // 16 * strip,
                    strip,
                )
                done += 32 * whole
            if done < run:
                add_value_tile(
                    row + 2 * done,
                    2 * WEIGHT_COLUMNS,
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
                weights + 4 * (key - begin),
                4 * WEIGHT_COLUMNS,
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
            )
        key += run


@jit
def attend_keys(
    args: int,
    request: int,
    kv_head: int,
    position: int,
    rows: int,
    is_sink: bool,
    key_begin: int,
    key_end: int,
    query: int,
    tiles: int,
    weights: int,
    weights_half: int,
    spare: int,
    sums: int,
    state: int,
) -> None:
    """Add the keys `[key_begin, key_end)` to the running softmax of a tile."""
    group = load_i64(args + HEADS) // load_i64(args + KV_HEADS)
    block_size = load_i64(args + BLOCK_SIZE)
    # Chunks of whole pages, or at least of whole vectors or matrix tiles of a page.
    align = 32 if tiles and block_size % 32 == 0 else 16
    span = types.int64(CHUNK)
    if block_size <= CHUNK:
        span = CHUNK - CHUNK % block_size
    begin = key_begin - key_begin % align
    while begin < key_end:
        end = min(begin - begin % span + span, key_end)
        if tiles == 1:
            if begin < key_begin:
                prefetch_page(args, request, kv_head, begin, align, False)
            if end % align != 0:
                tail = end % align
                prefetch_page(args, request, kv_head, end - tail, tail, False)
        _multiply_keys(
            args, request, kv_head, begin, end, query, rows, tiles, spare, weights
        )
        _update_softmax(
            args,
            position,
            kv_head * group,
            rows,
            is_sink,
            begin,
            end,
            weights,
            weights_half,
            sums,
            state,
        )
        _add_values(
            args,
            request,
            kv_head,
            begin,
            end,
            key_begin,
            rows,
            tiles,
            weights_half if tiles else weights,
            spare,
            sums,
        )
        begin = end
