# SPDX-License-Identifier: Apache-2.0
"""The online softmax: logits of a tile become weights, under a running maximum."""

from numba import types

from sink_paged.attention.arguments import (
    GROUP,
    HEAD_SIZE,
    RECENT,
    SCALE,
    SINKS,
    SLOPES,
    SOFT_CAP,
)
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


@jit
def _mask_range(logits: int, begin: int, low: int, high: int, end: int) -> None:
    """-inf in `[begin, end)` but for `[low, high)`; begin and end multiples of 16."""
    for column in range(begin, end, 16):
        if column < low or column + 16 > high:
            mask(logits, column, low, high)


@jit
def update_softmax(
    args: int,
    position: int,
    first_head: int,
    rows: int,
    sink_begin: int,
    sink_end: int,
    begin: int,
    end: int,
    sink_column: int,
    columns: int,
    row_columns: int,
    weights: int,
    weights_half: int,
    sums: int,
    state: int,
) -> None:
    """Turn logits into weights; scale the `sums` so far, and keep their `state`.

    A row has the logits of the keys `[begin, end)` from column 0, those of the sinks
    `[sink_begin, sink_end)` from `sink_column`, a multiple of 16 that is not before the
    end of the keys; `columns` is where it ends, a multiple of 16 too. Rows lie
    `row_columns` apart. Keys that a row does not attend weigh nothing in it.
    `weights_half` is where bfloat16 weights go, 0 for float32 ones in place.
    """
    group = load_i64(args + GROUP)
    head_size, slopes = load_i64(args + HEAD_SIZE), load_i64(args + SLOPES)
    recent, capacity = load_i64(args + RECENT), load_i64(args + SINKS)
    capacity += recent
    scale = types.float32(load_f64(args + SCALE))
    soft_cap = types.float32(load_f64(args + SOFT_CAP))
    general = slopes != 0 or soft_cap > 0
    factor = types.float32(load_f64(args + SCALE) * LOG2_E)
    if general:
        factor = types.float32(1)
    slope = types.float32(0.0)
    i, member = position, types.int64(0)
    for row in range(rows):
        logits = weights + row * 4 * row_columns
        half = weights_half + row * 2 * row_columns
        low = min(max(i - recent - begin, 0), end - begin)
        high = max(min(i + 1, end) - begin, low)
        sinks = max(min(sink_end, i - recent) - sink_begin, 0)
        first, last = low & -16, (high + 15) & -16
        if high == low and sinks == 0:
            first = last = types.int64(0)
        else:
            if slopes != 0:
                slope = load_f32(slopes + 4 * (first_head + member))
            if general:
                shift = types.float32(begin - i)
                general_logits(logits, first, last, scale, soft_cap, slope, shift)
            if first < low:
                mask(logits, first, low, high)
            if sinks > 0:
                if general:
                    shift = types.float32(sink_begin - sink_column - min(i, capacity))
                    general_logits(
                        logits, sink_column, columns, scale, soft_cap, slope, shift
                    )
                _mask_range(logits, high & -16, low, high, sink_column)
                sinks += sink_column
                _mask_range(logits, sink_column, sink_column, sinks, columns)
                last = columns
            elif high < last:
                mask(logits, last - 16, low, high)
            previous = load_f32(state + 8 * row)
            total = load_f32(state + 8 * row + 4)
            largest = max(previous, largest_of(logits, first, last) * factor)
            if largest > previous:
                decay = exp2(previous - largest)
                scale_row(sums + row * 4 * head_size, head_size, decay)
                total *= decay
                store_f32(state + 8 * row, largest)
            if weights_half:
                total += exponentials_bf16(logits, first, last, factor, largest, half)
            else:
                total += exponentials(logits, first, last, factor, largest)
            store_f32(state + 8 * row + 4, total)
        if weights_half:
            zero_half_row(half, types.int64(0), first)
            zero_half_row(half, last, columns)
        else:
            zero_row(logits, types.int64(0), first)
            zero_row(logits, last, columns)
        member += 1
        if member == group:
            i, member = i + 1, types.int64(0)
