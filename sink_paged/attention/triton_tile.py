# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Device code of the Triton kernels: which tile, where a key lies, one softmax step.

Logits are kept in base 2, so that every exponential is one `exp2`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every logit and finite: `exp2` of a masked logit minus this is 0, never NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def first_tile(query_start_loc, request, group: tl.constexpr, rows: tl.constexpr):
    """Number of a request's first tile.

    Tiles are numbered by request without a host's help: one of `rows` rows for every
    full one before the request, and one more for each request before it.
    """
    return tl.load(query_start_loc + request) * group // rows + request


@triton.jit
def find_request(
    query_start_loc, tile, num_requests, group: tl.constexpr, rows: tl.constexpr
):
    """The last request whose first tile is not behind `tile`, by bisection."""
    low = tile * 0
    high = num_requests + low
    while low + 1 < high:
        middle = (low + high) // 2
        begun = first_tile(query_start_loc, middle, group, rows) <= tile
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def tile_rows(
    query,
    start,
    first_row,
    num_rows,
    kv_head,
    query_token,
    query_head,
    group: tl.constexpr,
    rows: tl.constexpr,
):
    """What stands in the rows of a tile, each `[rows]`.

    Rows behind the request's repeat its last one; they are not stored.

    Args:
        query: of the batch.
        start: the request's first row of the batch.
        first_row: of the tile, of the request's rows (tokens times query heads).
        num_rows: of the request.
        kv_head: of the tile.
        query_token: elements of `query` from token to token.
        query_head: elements from head to head.
        group: query heads of a KV head.
        rows: of the tile.

    Returns:
        Whether to store a row; its token of the request, query head, row of the batch
        (int64), and pointer to its query.
    """
    row = first_row + tl.arange(0, rows)
    stored = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    token = row // group
    head = kv_head * group + row % group
    batch_row = (start + token).to(tl.int64)
    query_rows = query + batch_row * query_token + head * query_head
    return stored, token, head, batch_row, query_rows


@triton.jit
def key_pointers(
    cache,
    table,
    column,
    num_columns,
    ring,
    first_key,
    valid,
    cache_block,
    keys: tl.constexpr,
    block_size: tl.constexpr,
    cache_slot: tl.constexpr,
):
    """Pointers `[keys]` to the first dim of consecutive keys.

    Args:
        cache: the KV head's part of the cache.
        table: the request's row of the block table.
        column: of the block that `first_key` counts from.
        num_columns: of the table.
        ring: columns behind the pinned ones, at least as many as blocks in question,
            so that a column runs off the table's end at most once.
        first_key: of the tile, counted from the start of column's block.
        valid: `[keys]`, keys whose block the table has.
        cache_block: elements from block to block.
        keys: of the tile.
        block_size: keys of a block.
        cache_slot: elements from key to key.
    """
    key = first_key + tl.arange(0, keys)
    if block_size % keys == 0:  # a tile lies within one block
        column += first_key // block_size
        column = tl.where(column >= num_columns, column - ring, column)
        number = tl.load(table + column).to(tl.int64)
        slot = first_key % block_size + tl.arange(0, keys)
    else:
        columns = column + key // block_size
        columns = tl.where(columns >= num_columns, columns - ring, columns)
        number = tl.load(table + columns, mask=valid, other=0).to(tl.int64)
        slot = key % block_size
    return cache + number * cache_block + slot * cache_slot


@triton.jit
def load_rows(
    pointers, valid, head_size: tl.constexpr, padded: tl.constexpr, masked: tl.constexpr
):
    """Rows `[keys, padded]`; zeros where a key is not valid, and behind the head."""
    dim = tl.arange(0, padded)
    at = pointers[:, None] + dim[None, :]
    if masked:
        return tl.load(at, mask=valid[:, None] & (dim < head_size)[None, :], other=0.0)
    if head_size == padded:
        return tl.load(at)
    return tl.load(at, mask=(dim < head_size)[None, :], other=0.0)


@triton.jit
def fold(
    acc,
    norm,
    peak,
    products,
    values,
    distance,
    visible,
    logit_scale,
    soft_cap,
    slopes,
    masked: tl.constexpr,
):
    """One step of the online softmax.

    Args:
        acc: float32 `[rows, padded]`, weighted sum of the values so far.
        norm: float32 `[rows]`, sum of the weights so far.
        peak: float32 `[rows]`, the largest logit so far, which weights are relative to.
        products: float32 `[rows, keys]`, queries times keys.
        values: `[keys, padded]` in the dtype to multiply in.
        distance: int32 `[rows, keys]`, used with slopes only.
        visible: `[rows, keys]`, used if masked.
        logit_scale: factor to base-2 logits, or to twice the argument of the cap's
            tanh, base 2.
        soft_cap: base-2 cap, or None.
        slopes: base-2 ALiBi slopes `[rows]`, or None.
        masked: whether some keys are invisible to some rows.
    """
    logits = products * logit_scale
    if soft_cap is not None:  # cap * tanh(x), with exp2(logits) = exp(2 x)
        logits = soft_cap - 2.0 * soft_cap / (1.0 + tl.exp2(logits))
    if slopes is not None:
        logits -= slopes[:, None] * distance.to(tl.float32)
    if masked:
        logits = tl.where(visible, logits, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    norm = norm * fade + tl.sum(weights, 1)
    acc = tl.dot(
        weights.to(values.dtype), values, acc * fade[:, None], input_precision="tf32x3"
    )
    return acc, norm, new_peak


@triton.jit
def attend_window(
    acc,
    norm,
    peak,
    q,
    position,
    first_key,
    oldest,
    end,
    cache,
    table,
    column,
    num_columns,
    ring,
    cache_block,
    window_tokens,
    logit_scale,
    soft_cap,
    slopes,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    block_size: tl.constexpr,
    cache_slot: tl.constexpr,
    keys: tl.constexpr,
    masked: tl.constexpr,
):
    """Fold one tile of window keys into the softmax.

    Positions and keys count from the block in `column`. Only keys in `[oldest, end)`
    are read if masked; otherwise every row sees all of the tile.
    """
    key = first_key + tl.arange(0, keys)
    valid = (key >= oldest) & (key < end)
    pointers = key_pointers(
        cache,
        table,
        column,
        num_columns,
        ring,
        first_key,
        valid,
        cache_block,
        keys,
        block_size,
        cache_slot,
    )
    k = load_rows(pointers, valid, head_size, padded, masked)
    v = load_rows(pointers + head_size, valid, head_size, padded, masked)
    distance = position[:, None] - key[None, :]
    return fold(
        acc,
        norm,
        peak,
        tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3"),
        v.to(q.dtype),
        distance,
        (distance >= 0) & (distance <= window_tokens),
        logit_scale,
        soft_cap,
        slopes,
        masked,
    )
