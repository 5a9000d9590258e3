# SPDX-License-Identifier: Apache-2.0
"""Attention of up to 16 query rows, as of a decode, on matrix tiles; pages as in `cpu`.

Sinks and window share one softmax, and as many keys as the scratch memory of a tile of
many rows holds. A row of logits or weights is `[32 sinks | keys of the window]`.
"""

from numba import types

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    RECENT,
    SCALE,
    SINKS,
    SLOPES,
    SOFT_CAP,
)
from sink_paged.attention.matmul import multiply
from sink_paged.attention.pages import add_value_tile, find_page, prefetch_page
from sink_paged.attention.simd import (
    LOG2_E,
    jit,
    load_f32,
    load_f64,
    load_i64,
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

SPAN = 1024  # keys that share one softmax update
SINK_COLUMNS = 32  # a matrix tile of values
COLUMNS = SINK_COLUMNS + SPAN + 32


@jit
def _multiply_keys(
    args: int,
    request: int,
    kv_head: int,
    begin: int,
    end: int,
    query: int,
    logits: int,
    next_values: int,
) -> None:
    """Products of query rows and the keys `[begin, end)`, `begin` a multiple of 32.

    `next_values` is where the values lie that are read after the last key.
    """
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    key_tile = 32 * head_size
    key = begin
    page = find_page(args, request, kv_head, key)
    while key < end:
        offset = key % block_size
        run = min(block_size - offset, end - key)
        next_page, next_stride = next_values, 32 * block_size
        keys = page + offset // 16 * key_tile
        if key + run < end:
            page = find_page(args, request, kv_head, key + run)
            next_page, next_stride = page, key_tile
        multiply_tiles(
            query,
            2 * head_size,
            keys,
            64,
            key_tile,
            1024,
            logits + 4 * (key - begin),
            4 * COLUMNS,
            1,
            (run + 15) // 16,
            head_size // 32,
            0,
            next_page,
            next_stride,
        )
        key += run


@jit
def _prepare_range(
    args: int, logits: int, low: int, high: int, slope: float, shift: int
) -> None:
    """Bias and cap the logits `[low, high)`; -inf around them, to whole vectors."""
    low16, high16 = low & -16, (high + 15) & -16
    soft_cap = types.float32(load_f64(args + SOFT_CAP))
    if slope != 0 or soft_cap > 0:
        scale = types.float32(load_f64(args + SCALE))
        distance = types.float32(shift)
        general_logits(logits, low16, high16, scale, soft_cap, slope, distance)
    if low16 < low:
        mask(logits, low16, low, high)
    if high < high16:
        mask(logits, high16 - 16, low, high)


@jit
def _update_softmax(
    args: int,
    position: int,
    first_head: int,
    rows: int,
    sink_end: int,
    begin: int,
    end: int,
    weights: int,
    weights_half: int,
    sums: int,
    state: int,
) -> None:
    """Turn the logits of the sinks, if any, and of keys `[begin, end)` into weights.

    Keys that a row does not attend weigh nothing in it.
    """
    group = load_i64(args + HEADS) // load_i64(args + KV_HEADS)
    head_size, slopes = load_i64(args + HEAD_SIZE), load_i64(args + SLOPES)
    recent = load_i64(args + RECENT)
    factor = types.float32(load_f64(args + SCALE) * LOG2_E)
    slope = types.float32(0.0)
    if slopes != 0 or load_f64(args + SOFT_CAP) > 0:
        factor = types.float32(1)
    tiles_end = SINK_COLUMNS + ((end - begin + 31) & -32)
    for row in range(rows):
        i = position + row // group
        logits = weights + row * 4 * COLUMNS
        half = weights_half + row * 2 * COLUMNS
        if slopes != 0:
            slope = load_f32(slopes + 4 * (first_head + row % group))
        largest = previous = load_f32(state + 8 * row)
        sinks = max(min(sink_end, i - recent), 0)
        sinks16 = (sinks + 15) & -16
        if sinks > 0:
            shift = -min(i, load_i64(args + SINKS) + recent)
            _prepare_range(args, logits, types.int64(0), sinks, slope, shift)
            largest = max(largest, largest_of(logits, types.int64(0), sinks16) * factor)
        low = SINK_COLUMNS + max(i - recent - begin, 0)
        high = SINK_COLUMNS + min(i + 1, end) - begin
        low16, high16 = low & -16, (high + 15) & -16
        if low < high:
            shift = begin - SINK_COLUMNS - i
            _prepare_range(args, logits, low, high, slope, shift)
            largest = max(largest, largest_of(logits, low16, high16) * factor)
        else:
            low16 = high16 = types.int64(SINK_COLUMNS)
        total = load_f32(state + 8 * row + 4)
        if largest > previous:
            decay = exp2(previous - largest)
            scale_row(sums + row * 4 * head_size, head_size, decay)
            total *= decay
            store_f32(state + 8 * row, largest)
        if sinks > 0:
            total += exponentials(logits, types.int64(0), sinks16, factor, largest)
        total += exponentials_bf16(logits, low16, high16, factor, largest, half)
        store_f32(state + 8 * row + 4, total)
        zero_row(logits, sinks16, (sink_end + 15) & -16)
        zero_half_row(half, types.int64(SINK_COLUMNS), low16)
        zero_half_row(half, high16, tiles_end)


@jit
def _add_run(
    args: int,
    weights: int,
    page: int,
    offset: int,
    run: int,
    written: int,
    next_values: int,
    spare: int,
    sums: int,
) -> None:
    """Add the weighted values of `run` tokens of a page, `written` of them written."""
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    strip = 32 * block_size
    values = page + 2 * block_size * head_size + 32 * offset
    tiles = (run + 31) // 32
    # Zero times a NaN is a NaN: slots that were never written are not multiplied.
    whole = tiles if 32 * tiles <= written else tiles - 1
    if whole > 0:
        multiply_tiles(
            weights,
            2 * COLUMNS,
            values,
            64,
            strip,
            1024,
            sums,
            4 * head_size,
            1,
            head_size // 16,
            whole,
            1,
            next_values,
            strip,
        )
    if whole < tiles:
        add_value_tile(
            weights + 64 * whole,
            2 * COLUMNS,
            values + 1024 * whole,
            strip,
            types.int64(0),
            run - 32 * whole,
            types.int64(1),
            head_size,
            spare,
            sums,
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
    seq_len: int,
    sink_query: int,
    query: int,
    weights: int,
    weights_half: int,
    spare: int,
    sums: int,
    state: int,
) -> None:
    """Add the sinks `[0, sink_end)` and the keys `[key_begin, key_end)` to a softmax.

    Slots of attended pages are written up to `seq_len`.
    """
    group = load_i64(args + HEADS) // load_i64(args + KV_HEADS)
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    values_offset = 2 * block_size * head_size
    begin = key_begin & -32
    while begin < key_end or sink_end > 0:
        end = begin + SPAN
        if end < key_end and block_size < SPAN:
            end -= end % block_size
        end = max(min(end, key_end), begin)
        first_page = find_page(args, request, kv_head, begin)
        first_values = first_page + values_offset + 32 * (begin % block_size)
        if end % 32 != 0 and seq_len < (end | 31) + 1:
            tail = end % 32
            prefetch_page(args, request, kv_head, end - tail, tail, False)
        sink_page = first_page
        if sink_end > 0:
            sink_page = find_page(args, request, kv_head, types.int64(0))
            _multiply_keys(
                args,
                request,
                kv_head,
                types.int64(0),
                sink_end,
                sink_query,
                weights,
                first_page + begin % block_size * 2 * head_size,
            )
        _multiply_keys(
            args,
            request,
            kv_head,
            begin,
            end,
            query,
            weights + 4 * SINK_COLUMNS,
            first_values,
        )
        _update_softmax(
            args,
            position,
            kv_head * group,
            rows,
            sink_end,
            begin,
            end,
            weights,
            weights_half,
            sums,
            state,
        )
        if sink_end > 0:
            # Few values, of which a matrix tile would read many more.
            multiply(
                types.int64(1),
                weights,
                4 * COLUMNS,
                sink_page + values_offset,
                64,
                32 * block_size,
                sums,
                4 * head_size,
                rows,
                head_size // 16,
                sink_end,
                1,
            )
            sink_end = types.int64(0)
        key, page = begin, first_page
        while key < end:
            offset = key % block_size
            run = min(block_size - offset, end - key)
            row = weights_half + 2 * (SINK_COLUMNS + key - begin)
            this_page, next_values = page, page
            if key + run < end:
                page = find_page(args, request, kv_head, key + run)
                next_values = page + values_offset
            _add_run(
                args,
                row,
                this_page,
                offset,
                run,
                seq_len - key,
                next_values,
                spare,
                sums,
            )
            key += run
        begin = end
