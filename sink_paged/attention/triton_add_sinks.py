# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The Triton kernel that adds cut-off sinks to attention over the window."""

import triton
import triton.language as tl

from sink_paged.attention.triton_sinks import attend_sinks
from sink_paged.attention.triton_tile import (
    LOG2_E,
    LOWEST,
    find_request,
    first_tile,
    load_rows,
    tile_rows,
)


@triton.jit(do_not_specialize=["num_requests"])
def add_sinks(
    query,
    kv_cache,
    output,
    window_norm,
    query_start_loc,
    seq_lens,
    block_table,
    sink_rotation,
    logit_scale,
    soft_cap,
    num_requests,
    num_columns,
    window_tokens,
    query_token,
    query_head,
    output_token,
    output_head,
    norm_head,
    cache_block,
    table_row,
    rotation_row,
    sink_tokens: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rotary_dim: tl.constexpr,
    half_padded: tl.constexpr,
    rest_padded: tl.constexpr,
    interleaved: tl.constexpr,
    block_size: tl.constexpr,
    cache_head: tl.constexpr,
    cache_slot: tl.constexpr,
    rows: tl.constexpr,
    sink_keys: tl.constexpr,
):
    """Weigh a tile's output, of the window, against the sinks, by both log-sum-exps.

    Grid: tiles as `triton_attend.attend` numbers them, KV heads. `window_norm` is
    float32 `[num_heads, num_tokens]`, natural logarithms. Rows that see all sinks in
    their window, or have none, stay as they are.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = find_request(query_start_loc, tile, num_requests, group, rows)
    first_row = rows * (tile - first_tile(query_start_loc, request, group, rows))
    start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - start
    num_rows = query_len * group
    context = tl.load(seq_lens + request) - query_len
    last = context + (tl.minimum(first_row + rows, num_rows) - 1) // group
    num_sinks = tl.minimum(sink_tokens, last - window_tokens)
    if (first_row >= num_rows) | (num_sinks <= 0):
        return

    stored, token, head, batch_row, query_rows = tile_rows(
        query,
        start,
        first_row,
        num_rows,
        kv_head,
        query_token,
        query_head,
        group,
        rows,
    )
    q = load_rows(query_rows, stored, head_size, padded, False)
    acc, norm, peak = attend_sinks(
        tl.zeros([rows, padded], tl.float32),
        tl.zeros([rows], tl.float32),
        tl.full([rows], LOWEST, tl.float32),
        q,
        query_rows,
        sink_rotation + batch_row * rotation_row if rotary_dim > 0 else None,
        stored,
        context + token,
        num_sinks,
        kv_cache + kv_head.to(tl.int64) * cache_head,
        block_table + request.to(tl.int64) * table_row,
        num_columns,
        cache_block,
        window_tokens,
        logit_scale,
        soft_cap,
        None,
        sink_tokens,
        head_size,
        padded,
        rotary_dim,
        half_padded,
        rest_padded,
        interleaved,
        block_size,
        cache_slot,
        sink_keys,
    )
    changed = stored & (norm > 0.0)
    norm_rows = window_norm + head.to(tl.int64) * norm_head + batch_row
    other = tl.load(norm_rows, mask=changed, other=0.0) * LOG2_E
    top = tl.maximum(peak, other)
    other, ours = tl.exp2(other - top), tl.exp2(peak - top)
    dim = tl.arange(0, padded)
    at = (output + batch_row * output_token + head * output_head)[:, None] + dim
    mask = changed[:, None] & (dim < head_size)[None, :]
    of_window = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    total = of_window * other[:, None] + acc * ours[:, None]
    total /= (other + norm * ours)[:, None]
    tl.store(at, total.to(output.dtype.element_ty), mask=mask)
