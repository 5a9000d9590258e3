# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The Triton kernel of sink attention: one tile of query rows against its keys.

The rows of a tile are tokens times the query heads of one KV head, of one request. The
keys that a tile needs, half-open in text positions, for its tokens `first .. last`::

    cut-off sinks        [0, min(S, last - R))
    window               [first - R, last + 1), from the start of a block
    seen by every row    [last - R, first + 1), whose key tiles need no mask

Window keys are counted from the start of their first block, so that no number but a
position exceeds the window, and nothing overflows at the end of int32.
"""

import triton
import triton.language as tl

from sink_paged.attention.triton_sinks import attend_sinks
from sink_paged.attention.triton_tile import (
    LOG2_E,
    LOWEST,
    attend_window,
    find_request,
    first_tile,
    load_rows,
    tile_rows,
)


@triton.jit(do_not_specialize=["num_requests", "split_bits"])
def attend(
    query,
    kv_cache,
    output,
    query_start_loc,
    seq_lens,
    block_table,
    sink_rotation,
    alibi_slopes,
    sink_logits,
    k_scale,
    v_scale,
    partial_output,
    partial_norm,
    logit_scale,
    soft_cap,
    num_requests,
    split_bits,
    num_columns,
    window_tokens,
    query_token,
    query_head,
    output_token,
    output_head,
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
    keys: tl.constexpr,
    sink_keys: tl.constexpr,
    one_tile: tl.constexpr,
    is_split: tl.constexpr,
):
    """Attention of one tile, KV head and part of the keys; see `triton.sink_attention`.

    Grid: tiles, KV heads, parts. With `one_tile` a request has one tile, its number. If
    the keys are split, each of `2 ** split_bits` parts takes a share of the window's
    key tiles, and one more, where there are sinks, these alone: no program waits for
    one after the other. Parts leave their results for `triton_merge.merge`.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = tile
    first_row = 0
    if not one_tile:
        request = find_request(query_start_loc, tile, num_requests, group, rows)
        first_row = rows * (tile - first_tile(query_start_loc, request, group, rows))
    start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - start
    seq_len = tl.load(seq_lens + request)
    context = seq_len - query_len
    num_rows = query_len * group
    # The second says nothing new: it has one wait for all three loads, not two.
    if first_row >= num_rows or seq_len <= 0:
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

    first = context + first_row // group
    last = context + (tl.minimum(first_row + rows, num_rows) - 1) // group
    table = block_table + request.to(tl.int64) * table_row
    cache = kv_cache + kv_head.to(tl.int64) * cache_head
    if k_scale is not None:
        logit_scale *= tl.load(k_scale)
    value_scale = 1.0
    if v_scale is not None:
        value_scale = tl.load(v_scale)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head).to(tl.float32) * LOG2_E

    acc = tl.zeros([rows, padded], tl.float32)
    norm = tl.zeros([rows], tl.float32)
    peak = tl.full([rows], LOWEST, tl.float32)
    if sink_logits is not None:  # a key without a value, counted by the first split
        logit = tl.load(sink_logits + head).to(tl.float32) * LOG2_E
        peak = tl.where(split == 0, logit, peak)
        norm = tl.where(split == 0, norm + 1.0, norm)

    if sink_tokens > 0:
        num_sinks = tl.minimum(sink_tokens, last - window_tokens)
        if (split == 1 << split_bits or not is_split) and num_sinks > 0:
            acc, norm, peak = attend_sinks(
                acc,
                norm,
                peak,
                q,
                query_rows,
                sink_rotation + batch_row * rotation_row if rotary_dim > 0 else None,
                stored,
                context + token,
                num_sinks,
                cache,
                table,
                num_columns,
                cache_block,
                window_tokens,
                logit_scale,
                soft_cap,
                slopes,
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

    # Window keys, counted from the start of the block that holds the oldest one.
    pinned: tl.constexpr = (sink_tokens + block_size - 1) // block_size
    ring = num_columns - pinned
    oldest = tl.maximum(first - window_tokens, 0)
    first_block = oldest // block_size
    column = first_block
    if first_block >= pinned:
        column = pinned + (first_block - pinned) % ring
    origin = first_block * block_size
    oldest -= origin
    end = last + 1 - origin
    position = context - origin + token
    num_tiles = tl.cdiv(end, keys)
    # Key tiles [begin, clear_begin) and [clear_end, end) of this program need masks.
    tile_begin = split * num_tiles >> split_bits
    tile_end = tl.minimum((split + 1) * num_tiles >> split_bits, num_tiles)
    clear_begin = tl.cdiv(tl.maximum(last - window_tokens - origin, 0), keys)
    clear_end = (first + 1 - origin) // keys
    if rows <= 32:  # masks are cheap, a break in the stream of keys is not
        clear_end = clear_begin
    clear_begin = tl.minimum(tl.maximum(clear_begin, tile_begin), tile_end)
    clear_end = tl.minimum(tl.maximum(clear_end, clear_begin), tile_end)
    num_clear = clear_end - clear_begin
    for edge in range(tile_begin, tile_end - num_clear):
        acc, norm, peak = attend_window(
            acc,
            norm,
            peak,
            q,
            position,
            keys * tl.where(edge < clear_begin, edge, edge + num_clear),
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
            head_size,
            padded,
            block_size,
            cache_slot,
            keys,
            True,
        )
    if rows > 32:
        for clear in range(clear_begin, clear_end):
            acc, norm, peak = attend_window(
                acc,
                norm,
                peak,
                q,
                position,
                keys * clear,
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
                head_size,
                padded,
                block_size,
                cache_slot,
                keys,
                False,
            )

    acc /= norm[:, None]
    if v_scale is not None:
        acc *= value_scale
    dim = tl.arange(0, padded)
    stored_dims = stored[:, None] & (dim < head_size)[None, :]
    if not is_split:
        output_rows = output + batch_row * output_token + head * output_head
        tl.store(
            output_rows[:, None] + dim[None, :],
            acc.to(output.dtype.element_ty),
            mask=stored_dims,
        )
    else:
        program = request * tl.num_programs(1) + kv_head
        program = program * tl.num_programs(2) + split
        partial = program * rows + tl.arange(0, rows)
        empty = norm == 0.0
        tl.store(
            partial_norm + partial,
            tl.where(empty, LOWEST, peak + tl.log2(tl.where(empty, 1.0, norm))),
            mask=stored,
        )
        tl.store(
            partial_output + partial[:, None] * head_size + dim[None, :],
            acc,
            mask=stored_dims & (norm != 0.0)[:, None],  # NaN too
        )
