# SPDX-License-Identifier: Apache-2.0
"""Sink attention on the CPU: vLLM's paged cache, torch's own OpenMP threads.

A page, the interior of a (block, kv head), holds keys, then values, both in tiles that
are read front to back: one vector is one dim of 16 keys, or 16 dims of one value.
bfloat16 comes in pairs, of dims for keys and of tokens for values, which is the order
of the CPU's bfloat16 dot products; `pair` is 1 otherwise::

    keys    [block_size / 16, head_size / pair, 16 tokens, pair]
    values  [head_size / 16, block_size / pair, 16 dims, pair]

A work item is a (request, kv head, query tile); the rows of a tile are its tokens times
the query heads that share the kv head. Threads draw items from a shared counter.
"""

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from numba import cfunc, types
from torch import Tensor

from sink_paged.attention.simd import (
    HAS_AMX,
    LOG2_E,
    begin_tiles,
    end_tiles,
    exp2,
    exponentials,
    exponentials_twice,
    fetch_add,
    general_logits,
    jit,
    largest_of,
    load_f32,
    load_f64,
    load_i16,
    load_i32,
    load_i64,
    mask,
    multiply,
    multiply_tiles,
    narrow_row,
    scale_row,
    store_f32,
    store_i16,
    store_i32,
    widen_row,
    zero_half_row,
    zero_row,
)
from sink_paged.window import SinkWindow

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE_ROWS = 128  # of a query tile, which reads the keys once
CHUNK = 256  # keys that share one softmax update

# One call's arguments as the kernel reads them: 8 bytes each, addresses, strides in
# bytes and counts, the last two float64. The threads advance the first two.
_ARGUMENTS = struct.Struct("@35q2d")
(
    ITEM,
    THREAD,
    QUERY,
    QUERY_TOKEN,
    QUERY_HEAD,
    CACHE,
    CACHE_BLOCK,
    CACHE_HEAD,
    OUTPUT,
    OUTPUT_TOKEN,
    STARTS,
    SEQ_LENS,
    TABLE,
    TABLE_ROW,
    COLUMNS,
    ROTATION,
    ROTARY_DIM,
    HEADS,
    KV_HEADS,
    HEAD_SIZE,
    BLOCK_SIZE,
    SINKS,
    RECENT,
    KIND,
    INTERLEAVED,
    SLOPES,
    SINK_LOGITS,
    REQUESTS,
    TILE_TOKENS,
    MAX_ROWS,
    ROTATION_ROW,
    OUTPUT_HEAD,
    SCRATCH,
    SCRATCH_BYTES,
    AMX,
    SCALE,
    SOFT_CAP,
) = range(0, _ARGUMENTS.size, 8)


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
    for k in range(half):
        first = 2 * k if interleaved else k
        second = first + 1 if interleaved else k + half
        x, y = load_f32(source + 4 * first), load_f32(source + 4 * second)
        cos, sin = load_f32(angles + 4 * k), load_f32(angles + 4 * (k + half))
        store_f32(target + 4 * first, x * cos - y * sin)
        store_f32(target + 4 * second, y * cos + x * sin)


@jit
def _page(args: int, request: int, kv_head: int, key: int) -> int:
    """Address of the page that holds text position `key`."""
    block_size, sinks = load_i64(args + BLOCK_SIZE), load_i64(args + SINKS)
    num_columns = load_i64(args + COLUMNS)
    block, pinned = key // block_size, (sinks + block_size - 1) // block_size
    column = block
    if block >= pinned:
        column = pinned + (block - pinned) % (num_columns - pinned)
    row = load_i64(args + TABLE) + request * load_i64(args + TABLE_ROW)
    number = types.int64(load_i32(row + 4 * column))
    return (
        load_i64(args + CACHE)
        + number * load_i64(args + CACHE_BLOCK)
        + kv_head * load_i64(args + CACHE_HEAD)
    )


@jit
def _attend_segment(
    args: int,
    request: int,
    kv_head: int,
    position: int,
    first_head: int,
    rows: int,
    is_sink: bool,
    key_begin: int,
    key_end: int,
    query: int,
    query_half: int,
    tiles: int,
    weights: int,
    weights_half: int,
    sums: int,
    state: int,
) -> None:
    """Add the keys `[key_begin, key_end)` to the running softmax of a tile."""
    num_heads, num_kv_heads = load_i64(args + HEADS), load_i64(args + KV_HEADS)
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    sinks, recent = load_i64(args + SINKS), load_i64(args + RECENT)
    kind, slopes = load_i64(args + KIND), load_i64(args + SLOPES)
    scale = types.float32(load_f64(args + SCALE))
    soft_cap = types.float32(load_f64(args + SOFT_CAP))
    group = num_heads // num_kv_heads
    element = 4 if kind == 0 else 2
    pair = 2 if kind == 1 else 1
    key_tile, value_tile = 16 * head_size * element, 16 * block_size * element
    row_bytes, weight_bytes = 4 * head_size, 4 * CHUNK
    slope = types.float32(0.0)

    begin = key_begin - key_begin % 16
    while begin < key_end:
        end = min(begin + CHUNK, key_end)
        key = begin
        while key < end:
            offset = key % block_size
            run = min(block_size - offset, end - key)
            keys = _page(args, request, kv_head, key) + (offset // 16) * key_tile
            if tiles:
                multiply_tiles(
                    query_half,
                    row_bytes // 2,
                    keys,
                    64,
                    key_tile,
                    1024,
                    weights + 4 * (key - begin),
                    weight_bytes,
                    tiles,
                    (run + 15) // 16,
                    head_size // 32,
                    0,
                )
            else:
                multiply(
                    kind,
                    query,
                    row_bytes,
                    keys,
                    16 * element * pair,
                    key_tile,
                    weights + 4 * (key - begin),
                    weight_bytes,
                    rows,
                    (run + 15) // 16,
                    head_size,
                    0,
                )
            key += run

        for row in range(rows):
            i = position + row // group
            if is_sink:
                first, last = types.int64(0), min(sinks, i - recent)
                distance_from = min(i, sinks + recent)
            else:
                first, last = max(i - recent, 0), i + 1
                distance_from = i
            low, high = max(first, begin) - begin, min(last, end) - begin
            logits = weights + row * weight_bytes
            low16, high16 = low & -16, (high + 15) & -16
            if high <= low:
                low16 = high16 = types.int64(0)
            else:
                if slopes != 0 or soft_cap > 0:
                    if slopes != 0:
                        slope = load_f32(slopes + 4 * (first_head + row % group))
                    shift = types.float32(begin - distance_from)
                    general_logits(logits, low16, high16, scale, soft_cap, slope, shift)
                    factor = types.float32(1)
                else:
                    factor = scale * types.float32(LOG2_E)
                if low16 < low:
                    mask(logits, low16, low, high)
                if high < high16:
                    mask(logits, high16 - 16, low, high)
                largest = largest_of(logits, low16, high16) * factor
                previous = load_f32(state + 8 * row)
                if largest > previous:
                    decay = exp2(previous - largest)
                    store_f32(state + 8 * row, largest)
                    scale_row(sums + row * row_bytes, head_size, decay)
                    total = load_f32(state + 8 * row + 4) * decay
                else:
                    largest = previous
                    total = load_f32(state + 8 * row + 4)
                if tiles:
                    half = weights_half + row * (weight_bytes // 2)
                    total += exponentials_twice(
                        logits, low16, high16, factor, largest, half
                    )
                else:
                    total += exponentials(logits, low16, high16, factor, largest)
                store_f32(state + 8 * row + 4, total)
            # Keys of the chunk that another row attends weigh nothing in this one.
            zero_row(logits, 0, low16)
            zero_row(logits, high16, end - begin)
            if tiles:
                half = weights_half + row * (weight_bytes // 2)
                zero_half_row(half, 0, low16)
                zero_half_row(half, high16, end - begin)

        key = begin
        while key < end:
            offset = key % block_size
            run = min(block_size - offset, end - key)
            values = _page(args, request, kv_head, key)
            values += (block_size * head_size + 16 * offset) * element
            done = types.int64(0)
            if tiles:
                # Whole tiles of 32 keys; the rest may border on garbage.
                done = run & -32
                multiply_tiles(
                    weights_half + 2 * (key - begin),
                    weight_bytes // 2,
                    values,
                    64,
                    value_tile,
                    1024,
                    sums,
                    row_bytes,
                    tiles,
                    head_size // 16,
                    done // 32,
                    1,
                )
            if done < run:
                multiply(
                    kind,
                    weights + 4 * (key - begin + done),
                    weight_bytes,
                    values + 16 * done * element,
                    16 * element * pair,
                    value_tile,
                    sums,
                    row_bytes,
                    rows,
                    head_size // 16,
                    run - done,
                    1,
                )
            key += run
        begin += CHUNK


@jit
def _attend_tile(
    args: int,
    request: int,
    kv_head: int,
    first_token: int,
    num_tokens: int,
    scratch: int,
) -> None:
    """Attention of a tile: `num_tokens` tokens from `first_token` of the request."""
    num_heads, num_kv_heads = load_i64(args + HEADS), load_i64(args + KV_HEADS)
    head_size = load_i64(args + HEAD_SIZE)
    sinks, recent = load_i64(args + SINKS), load_i64(args + RECENT)
    kind, sink_logits = load_i64(args + KIND), load_i64(args + SINK_LOGITS)
    rotation = load_i64(args + ROTATION)
    group = num_heads // num_kv_heads
    first_head, rows = kv_head * group, num_tokens * group
    starts = load_i64(args + STARTS) + 4 * request
    end_row = types.int64(load_i32(starts + 4))
    row0 = types.int64(load_i32(starts)) + first_token
    position = (
        types.int64(load_i32(load_i64(args + SEQ_LENS) + 4 * request)) - end_row + row0
    )
    last = position + num_tokens - 1

    row_bytes = 4 * head_size
    max_rows = load_i64(args + MAX_ROWS)
    sink_query = scratch + max_rows * row_bytes
    sums = sink_query + max_rows * row_bytes
    weights = sums + max_rows * row_bytes
    weights_half = weights + max_rows * 4 * CHUNK
    query_half = weights_half + max_rows * 2 * CHUNK
    sink_query_half = query_half + max_rows * row_bytes // 2
    state = sink_query_half + max_rows * row_bytes // 2
    tiles = types.int64(0)
    if load_i64(args + AMX) != 0:
        tiles = (rows + 15) // 16
        begin_tiles(state, min(rows, 16))
    sink_end = min(sinks, last - recent)

    for row in range(rows):
        token, head = row0 + row // group, first_head + row % group
        source = (
            load_i64(args + QUERY)
            + token * load_i64(args + QUERY_TOKEN)
            + head * load_i64(args + QUERY_HEAD)
        )
        target = scratch + row * row_bytes
        widen_row(kind, source, target, head_size)
        if rotation != 0 and sink_end > 0:
            _rotate_row(
                target,
                sink_query + row * row_bytes,
                rotation + token * load_i64(args + ROTATION_ROW),
                head_size,
                load_i64(args + ROTARY_DIM),
                load_i64(args + INTERLEAVED) != 0,
            )
        if tiles:
            half = row * row_bytes // 2
            narrow_row(1, target, query_half + half, head_size, types.float32(1))
            if rotation != 0 and sink_end > 0:
                narrow_row(
                    1,
                    sink_query + row * row_bytes,
                    sink_query_half + half,
                    head_size,
                    types.float32(1),
                )
        zero_row(sums + row * row_bytes, 0, head_size)
        if sink_logits != 0:
            logit = load_f32(sink_logits + 4 * head) * types.float32(LOG2_E)
            store_f32(state + 8 * row, logit)
            store_f32(state + 8 * row + 4, types.float32(1))
        else:
            store_f32(state + 8 * row, types.float32(-1e30))
            store_f32(state + 8 * row + 4, types.float32(0))

    if sink_end > 0:
        _attend_segment(
            args,
            request,
            kv_head,
            position,
            first_head,
            rows,
            True,
            types.int64(0),
            sink_end,
            sink_query if rotation != 0 else scratch,
            sink_query_half if rotation != 0 else query_half,
            tiles,
            weights,
            weights_half,
            sums,
            state,
        )
    _attend_segment(
        args,
        request,
        kv_head,
        position,
        first_head,
        rows,
        False,
        max(position - recent, 0),
        last + 1,
        scratch,
        query_half,
        tiles,
        weights,
        weights_half,
        sums,
        state,
    )
    for row in range(rows):
        token, head = row0 + row // group, first_head + row % group
        target = (
            load_i64(args + OUTPUT)
            + token * load_i64(args + OUTPUT_TOKEN)
            + head * load_i64(args + OUTPUT_HEAD)
        )
        factor = types.float32(1) / load_f32(state + 8 * row + 4)
        narrow_row(kind, sums + row * row_bytes, target, head_size, factor)


@cfunc(types.void(types.int64), cache=True, error_model="numpy")
def _attend(args: int) -> None:
    """Body of one thread: draw work items until none is left."""
    num_requests, num_kv_heads = load_i64(args + REQUESTS), load_i64(args + KV_HEADS)
    tile_tokens, starts = load_i64(args + TILE_TOKENS), load_i64(args + STARTS)
    thread = fetch_add(args + THREAD, 1)
    scratch = load_i64(args + SCRATCH) + thread * load_i64(args + SCRATCH_BYTES)
    request, first_item = types.int64(0), types.int64(0)
    item = fetch_add(args + ITEM, 1)
    while request < num_requests:
        start = load_i32(starts + 4 * request)
        num_tokens = types.int64(load_i32(starts + 4 * request + 4) - start)
        tiles = (num_tokens + tile_tokens - 1) // tile_tokens
        if item >= first_item + tiles * num_kv_heads:
            first_item += tiles * num_kv_heads
            request += 1
            continue
        kv_head, tile = (item - first_item) // tiles, (item - first_item) % tiles
        token = tile * tile_tokens
        _attend_tile(
            args,
            request,
            kv_head,
            token,
            min(tile_tokens, num_tokens - token),
            scratch,
        )
        item = fetch_add(args + ITEM, 1)
    if load_i64(args + AMX) != 0:
        end_tiles()


@cfunc(types.void(types.int64), cache=True, error_model="numpy")
def _write(args: int) -> None:
    """Body of one thread: store one token after the other."""
    num_tokens, num_kv_heads = load_i64(args + REQUESTS), load_i64(args + KV_HEADS)
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    kind = load_i64(args + KIND)
    element = 2 if kind != 0 else 4
    while True:
        token = fetch_add(args + ITEM, 1)
        if token >= num_tokens:
            return
        slot = load_i64(load_i64(args + TABLE) + 8 * token)
        if slot < 0:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(num_kv_heads):
            key = (
                load_i64(args + QUERY)
                + token * load_i64(args + QUERY_TOKEN)
                + head * load_i64(args + QUERY_HEAD)
            )
            value = (
                load_i64(args + OUTPUT)
                + token * load_i64(args + OUTPUT_TOKEN)
                + head * load_i64(args + OUTPUT_HEAD)
            )
            page = (
                load_i64(args + CACHE)
                + block * load_i64(args + CACHE_BLOCK)
                + head * load_i64(args + CACHE_HEAD)
            )
            tile = page + (offset // 16) * 16 * head_size * element
            lane = offset % 16
            values = page + block_size * head_size * element
            strip = 16 * block_size * element
            if kind == 0:
                for d in range(head_size):
                    store_i32(tile + 64 * d + 4 * lane, load_i32(key + 4 * d))
                row = values + 64 * offset
                for d in range(head_size):
                    at = row + (d // 16) * strip + 4 * (d % 16)
                    store_i32(at, load_i32(value + 4 * d))
            elif kind == 1:
                for d in range(head_size // 2):
                    store_i32(tile + 64 * d + 4 * lane, load_i32(key + 4 * d))
                row = values + 64 * (offset // 2) + 2 * (offset % 2)
                for d in range(head_size):
                    at = row + (d // 16) * strip + 4 * (d % 16)
                    store_i16(at, load_i16(value + 2 * d))
            else:
                for d in range(head_size):
                    store_i16(tile + 32 * d + 2 * lane, load_i16(key + 2 * d))
                row = values + 32 * offset
                for d in range(head_size):
                    at = row + (d // 16) * strip + 2 * (d % 16)
                    store_i16(at, load_i16(value + 2 * d))


def _find_parallel() -> Callable[..., Any] | None:
    """`GOMP_parallel` of the OpenMP runtime that torch runs on, if it can be found.

    libgomp has it, and Intel's runtime, which vLLM may preload, for compatibility.
    Torch's own pool keeps the threads where vLLM has pinned them, and none is added.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    parallel.restype = None
    return parallel


# Linux must grant the tiles to the process, which torch asks for.
_AMX = HAS_AMX and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
_parallel = _find_parallel()
_local = threading.local()


def _workspace(nbytes: int) -> int:
    """Address of at least `nbytes` of scratch memory that this thread keeps."""
    scratch: Tensor | None = getattr(_local, "scratch", None)
    if scratch is None or scratch.numel() < nbytes:
        scratch = _local.scratch = torch.empty(nbytes, dtype=torch.uint8)
    return scratch.data_ptr()


def _run(kernel: Any, arguments: tuple[Any, ...], num_threads: int) -> None:
    packed = ctypes.create_string_buffer(_ARGUMENTS.pack(*arguments))
    if num_threads == 1 or _parallel is None:
        kernel.ctypes(ctypes.addressof(packed))
    else:
        _parallel(kernel.address, ctypes.addressof(packed), num_threads, 0)


def sink_attention(
    query: Tensor,
    kv_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    sink_rotation: Tensor | None,
    *,
    window: SinkWindow,
    scale: float,
    interleaved: bool = False,
    alibi_slopes: Tensor | None = None,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> None:
    """Attend sinks and window of every query of a batch, prefills and decodes alike.

    Args:
        query: `[num_tokens, num_heads, head_size]`, float32, bfloat16 or float16,
            rotated at its text position; rows may be strided. Rows behind
            `query_start_loc[-1]` are padding and ignored.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]` of query's
            dtype, written by `write_kv`; contiguous inside a (block, head).
            `block_size` and `head_size` are multiples of 16. Slots that no query
            attends may hold anything, NaN included.
        output: `[num_tokens, num_heads, head_size]`, query's dtype; written.
        query_start_loc: int32 `[num_reqs + 1]`, first row of each request.
        seq_lens: int32 `[num_reqs]`, text tokens including this step's: the rows of a
            request are its last positions.
        block_table: int32 `[num_reqs, num_columns]`, a ring behind the pinned columns
            (`BlockWindow.column`).
        sink_rotation: float32 `[num_tokens, rotary_dim]`, cosines then sines of the
            query's second rotation, by `min(i, C) - i`; None without rotary.
        window: sink and window tokens.
        scale: factor of the logits.
        interleaved: rotate pairs `(2k, 2k + 1)` instead of neox halves.
        alibi_slopes: float32 `[num_heads]`, or None.
        soft_cap: `cap * tanh(logit / cap)` before the ALiBi bias; 0 for none.
        sink_logits: float32 `[num_heads]`, a learned logit in the denominator only.
    """
    num_heads, head_size = query.shape[-2:]
    _, num_kv_heads, block_size, _ = kv_cache.shape
    if output.dim() == 2:
        output = output.view(-1, num_heads, head_size)
    element = query.element_size()
    query_strides, output_strides = query.stride(), output.stride()
    cache_strides, group = kv_cache.stride(), num_heads // num_kv_heads
    tile_tokens = max(1, TILE_ROWS // group)
    max_rows = (tile_tokens * group + 15) // 16 * 16
    scratch_bytes = max_rows * (16 * head_size + 6 * CHUNK + 64) + 4096
    amx = _AMX and query.dtype == torch.bfloat16 and head_size % 32 == 0
    num_threads = torch.get_num_threads()
    rotation, rotation_row, rotary_dim = 0, 0, 0
    if sink_rotation is not None:
        rotation, rotary_dim = sink_rotation.data_ptr(), sink_rotation.shape[-1]
        rotation_row = 4 * sink_rotation.stride(0)
    arguments = (
        0,
        0,
        query.data_ptr(),
        query_strides[0] * element,
        query_strides[1] * element,
        kv_cache.data_ptr(),
        cache_strides[0] * element,
        cache_strides[1] * element,
        output.data_ptr(),
        output_strides[0] * element,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        4 * block_table.stride(0),
        block_table.shape[1],
        rotation,
        rotary_dim,
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        window.sink_tokens,
        window.window_tokens,
        KINDS[query.dtype],
        interleaved,
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if sink_logits is None else sink_logits.data_ptr(),
        len(seq_lens),
        tile_tokens,
        max_rows,
        rotation_row,
        output_strides[1] * element,
        _workspace(num_threads * scratch_bytes),
        scratch_bytes,
        amx,
        scale,
        soft_cap,
    )
    _run(_attend, arguments, num_threads)


def write_kv(
    key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store the keys and values of a step's tokens in their slots.

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`, rotated at its text position.
        value: `[num_tokens, num_kv_heads, head_size]`.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`; written.
        slot_mapping: int64 `[num_tokens]`, `block * block_size + offset`; negative
            slots are padding and skipped.
    """
    head_size = key.shape[-1]
    _, num_kv_heads, block_size, _ = kv_cache.shape
    element = key.element_size()
    cache_strides, key_strides, value_strides = (
        kv_cache.stride(),
        key.stride(),
        value.stride(),
    )
    num_tokens = min(key.shape[0], slot_mapping.shape[0])
    num_threads = 1 if num_tokens < 16 else torch.get_num_threads()
    fields = dict.fromkeys(range(0, _ARGUMENTS.size, 8), 0)
    fields |= {
        QUERY: key.data_ptr(),
        QUERY_TOKEN: key_strides[0] * element,
        QUERY_HEAD: key_strides[1] * element,
        OUTPUT: value.data_ptr(),
        OUTPUT_TOKEN: value_strides[0] * element,
        OUTPUT_HEAD: value_strides[1] * element,
        CACHE: kv_cache.data_ptr(),
        CACHE_BLOCK: cache_strides[0] * element,
        CACHE_HEAD: cache_strides[1] * element,
        TABLE: slot_mapping.data_ptr(),
        KV_HEADS: num_kv_heads,
        HEAD_SIZE: head_size,
        BLOCK_SIZE: block_size,
        KIND: KINDS[key.dtype],
        REQUESTS: num_tokens,
    }
    _run(_write, tuple(fields.values()), num_threads)


def read_kv(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values out of the cache.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.

    Returns:
        Keys and values, each `[num_blocks, num_kv_heads, block_size, head_size]`.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    head_size = width // 2
    pair = 2 if kv_cache.dtype == torch.bfloat16 else 1
    pages = kv_cache.reshape(num_blocks, num_kv_heads, 2, block_size * head_size)
    keys, values = pages.unbind(2)
    shape = (num_blocks, num_kv_heads, block_size, head_size)
    keys = keys.reshape(*shape[:2], block_size // 16, head_size // pair, 16, pair)
    values = values.reshape(*shape[:2], head_size // 16, block_size // pair, 16, pair)
    return (
        keys.permute(0, 1, 2, 4, 3, 5).reshape(shape).clone(),
        values.permute(0, 1, 3, 5, 2, 4).reshape(shape).clone(),
    )
