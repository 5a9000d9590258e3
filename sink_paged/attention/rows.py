# SPDX-License-Identifier: Apache-2.0
"""What enters and leaves a query tile: queries, their rotation, parts, outputs."""

from numba import types

from sink_paged.attention.arguments import (
    GROUP,
    HEAD_SIZE,
    INTERLEAVED,
    KIND,
    MAX_ROWS,
    OUTPUT,
    OUTPUT_HEAD,
    OUTPUT_TOKEN,
    PARTIAL_BYTES,
    QUERY,
    QUERY_HEAD,
    QUERY_TOKEN,
    ROTARY_DIM,
    ROTATION,
    ROTATION_ROW,
    SUM_SCALE,
)
from sink_paged.attention.simd import (
    add_scaled_row,
    element_size,
    jit,
    load_f32,
    load_f64,
    load_i64,
    narrow_row,
    rotate_lanes,
    scale_row,
    store_f32,
    widen_row,
)
from sink_paged.attention.softmax import (
    exp2,
)


@jit
def _rotate_row(
    source: int,
    target: int,
    angles: int,
    head_size: int,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    half = rotary_dim // 2
    for k in range(rotary_dim, head_size):
        store_f32(target + 4 * k, load_f32(source + 4 * k))
    done = types.int64(0)
    if not interleaved:
        while done + 16 <= half:
            at = 4 * done
            rotate_lanes(source + at, target + at, angles + at, 4 * half)
            done += 16
    for k in range(done, half):
        first = 2 * k if interleaved else k
        second = first + 1 if interleaved else k + half
        x, y = load_f32(source + 4 * first), load_f32(source + 4 * second)
        cos, sin = load_f32(angles + 4 * k), load_f32(angles + 4 * (k + half))
        store_f32(target + 4 * first, x * cos - y * sin)
        store_f32(target + 4 * second, y * cos + x * sin)


@jit
def read_query(
    args: int,
    first_row: int,
    kv_head: int,
    rows: int,
    tiles: int,
    rotate: bool,
    query: int,
    sink_query: int,
    spare: int,
) -> None:
    """Copy the rows of a tile and, where `rotate`, their second rotation.

    Both are float32, or bfloat16 for matrix tiles; `spare` holds two rows.
    """
    kind, head_size = load_i64(args + KIND), load_i64(args + HEAD_SIZE)
    group = load_i64(args + GROUP)
    element = element_size(kind)
    one = types.float32(1)
    bytes_per_row = 2 * head_size if tiles else 4 * head_size
    token, member = first_row, types.int64(0)
    for row in range(rows):
        head = kv_head * group + member
        source = token * load_i64(args + QUERY_TOKEN)
        source += head * load_i64(args + QUERY_HEAD)
        source = load_i64(args + QUERY) + source * element
        target = query + row * bytes_per_row
        plain = spare if tiles else target
        if tiles:
            # 32 bfloat16 move as 16 float32.
            widen_row(0, source, target, head_size // 2)
        if rotate or not tiles:
            widen_row(kind, source, plain, head_size)
        if rotate:
            turned = sink_query + row * bytes_per_row
            _rotate_row(
                plain,
                plain + 4 * head_size if tiles else turned,
                load_i64(args + ROTATION) + token * load_i64(args + ROTATION_ROW),
                head_size,
                load_i64(args + ROTARY_DIM),
                load_i64(args + INTERLEAVED) != 0,
            )
            if tiles:
                narrow_row(1, plain + 4 * head_size, turned, head_size, one)
        member += 1
        if member == group:
            token, member = token + 1, types.int64(0)


@jit
def write_output(
    args: int, first_row: int, kv_head: int, rows: int, sums: int, state: int
) -> None:
    """Write the scaled sums of a tile's rows, divided by the sums of their weights."""
    kind, head_size = load_i64(args + KIND), load_i64(args + HEAD_SIZE)
    group = load_i64(args + GROUP)
    element = element_size(kind)
    scale = types.float32(load_f64(args + SUM_SCALE))
    token, member = first_row, types.int64(0)
    for row in range(rows):
        head = kv_head * group + member
        target = token * load_i64(args + OUTPUT_TOKEN)
        target += head * load_i64(args + OUTPUT_HEAD)
        target = load_i64(args + OUTPUT) + target * element
        factor = scale / load_f32(state + 8 * row + 4)
        narrow_row(kind, sums + row * 4 * head_size, target, head_size, factor)
        member += 1
        if member == group:
            token, member = token + 1, types.int64(0)


@jit
def merge_parts(args: int, partials: int, parts: int, rows: int) -> None:
    """Merge the sums and states of a tile's parts into the first, by log-sum-exp."""
    head_size, stride = load_i64(args + HEAD_SIZE), load_i64(args + PARTIAL_BYTES)
    states = partials + load_i64(args + MAX_ROWS) * 4 * head_size
    for row in range(rows):
        largest = load_f32(states + 8 * row)
        for part in range(1, parts):
            other = load_f32(states + part * stride + 8 * row)
            largest = max(largest, other)
        total = types.float32(0)
        for part in range(parts):
            state = states + part * stride + 8 * row
            factor = exp2(load_f32(state) - largest)
            total += factor * load_f32(state + 4)
            sums = partials + row * 4 * head_size
            if part == 0:
                scale_row(sums, head_size, factor)
            else:
                add_scaled_row(sums, head_size, factor, sums + part * stride)
        store_f32(states + 8 * row + 4, total)
