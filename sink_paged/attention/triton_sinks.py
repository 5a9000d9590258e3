# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Device code of the Triton kernel for sinks that have left the window.

Their distance is counted in the cache, so the query is rotated once more for them, in
float32. The two dims of each rotated pair, and the dims that are not rotated, lie in
tiles of their own, and the products are summed: nothing moves between registers.
"""

import triton
import triton.language as tl

from sink_paged.attention.triton_tile import fold, key_pointers, load_rows


@triton.jit
def load_pairs(
    pointers,
    valid,
    half: tl.constexpr,
    half_padded: tl.constexpr,
    interleaved: tl.constexpr,
):
    """First and second dims of each pair, `[rows, half_padded]`; invalid rows are 0."""
    pair = tl.arange(0, half_padded)[None, :]
    mask = valid[:, None] & (pair < half)
    if interleaved:
        first = pointers[:, None] + 2 * pair
        second = first + 1
    else:
        first = pointers[:, None] + pair
        second = first + half
    return tl.load(first, mask=mask, other=0.0), tl.load(second, mask=mask, other=0.0)


@triton.jit
def attend_sinks(
    acc,
    norm,
    peak,
    q,
    query_rows,
    angle_rows,
    stored,
    position,
    num_sinks,
    cache,
    table,
    num_columns,
    cache_block,
    window_tokens,
    logit_scale,
    soft_cap,
    slopes,
    sink_tokens: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    half_padded: tl.constexpr,
    rest_padded: tl.constexpr,
    interleaved: tl.constexpr,
    block_size: tl.constexpr,
    cache_slot: tl.constexpr,
    sink_keys: tl.constexpr,
):
    """Fold the first `num_sinks` keys of the text into the softmax.

    Args:
        acc: see `fold`, as are `norm` and `peak`.
        norm: see `fold`.
        peak: see `fold`.
        q: `[rows, padded]`, queries as they come.
        query_rows: `[rows]`, pointers to the queries.
        angle_rows: `[rows]`, pointers to their cosines, then sines.
        stored: `[rows]`, rows to compute.
        position: int32 `[rows]`, the queries' text positions.
        num_sinks: that at least one row has cut off.
        cache: see `key_pointers`.
        table: see `key_pointers`.
        num_columns: see `key_pointers`.
        cache_block: see `key_pointers`.
        window_tokens: `R`.
        logit_scale: see `fold`.
        soft_cap: see `fold`.
        slopes: see `fold`.
        sink_tokens: `S`.
        head_size: dims of a head.
        padded: a power of two that holds them.
        rotary_dim: dims that rotate, the first ones; 0 for none.
        half_padded: a power of two that holds half of them.
        rest_padded: a power of two that holds the other dims.
        interleaved: the style of the pairs.
        block_size: keys of a block.
        cache_slot: see `key_pointers`.
        sink_keys: keys of a tile.
    """
    rest: tl.constexpr = head_size - rotary_dim
    if rotary_dim > 0:
        half: tl.constexpr = rotary_dim // 2
        q_a, q_b = load_pairs(query_rows, stored, half, half_padded, interleaved)
        cos, sin = load_pairs(angle_rows, stored, half, half_padded, False)
        turned = q_a.to(tl.float32) * cos - q_b.to(tl.float32) * sin
        q_b = (q_b.to(tl.float32) * cos + q_a.to(tl.float32) * sin).to(q.dtype)
        q_a = turned.to(q.dtype)
        if rest > 0:
            q_rest = load_rows(query_rows + rotary_dim, stored, rest, rest_padded, True)
    for first_key in tl.range(0, num_sinks, sink_keys, num_stages=1):
        key = first_key + tl.arange(0, sink_keys)
        valid = key < num_sinks
        pointers = key_pointers(
            cache,
            table,
            0,
            num_columns,
            0,
            first_key,
            valid,
            cache_block,
            sink_keys,
            block_size,
            cache_slot,
        )
        if rotary_dim > 0:
            k_a, k_b = load_pairs(pointers, valid, half, half_padded, interleaved)
            k_a, k_b = tl.trans(k_a.to(q.dtype)), tl.trans(k_b.to(q.dtype))
            products = tl.dot(q_a, k_a, input_precision="tf32x3")
            products = tl.dot(q_b, k_b, products, input_precision="tf32x3")
            if rest > 0:
                k = load_rows(pointers + rotary_dim, valid, rest, rest_padded, True)
                k = tl.trans(k.to(q.dtype))
                products = tl.dot(q_rest, k, products, input_precision="tf32x3")
        else:
            k = load_rows(pointers, valid, head_size, padded, True)
            products = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3")
        v = load_rows(pointers + head_size, valid, head_size, padded, True)
        cut_off = key[None, :] < (position - window_tokens)[:, None]
        clamped = tl.minimum(position, sink_tokens + window_tokens)
        acc, norm, peak = fold(
            acc,
            norm,
            peak,
            products,
            v.to(q.dtype),
            clamped[:, None] - key[None, :],
            valid[None, :] & cut_off,
            logit_scale,
            soft_cap,
            slopes,
            True,
        )
    return acc, norm, peak
