# SPDX-License-Identifier: Apache-2.0
"""Sink attention on the CPU: vLLM's paged cache, torch's own OpenMP threads.

A page, the interior of a (block, kv head), holds keys, then values, both in tiles that
are read front to back: one vector is one dim of 16 keys, or 16 dims of one value.
bfloat16 comes in pairs, of dims for keys and of tokens for values, which is the order
of the CPU's bfloat16 dot products; `pair` is 1 otherwise::

    keys    [block_size / 16, head_size / pair, 16 tokens, pair]
    values  [head_size / 16, block_size / pair, 16 dims, pair]
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sink_paged.attention.arguments import ATTEND, STORE
from sink_paged.attention.kernel import scratch_size
from sink_paged.attention.launch import (
    has_matrix_tiles,
    load_kernels,
    run,
    workspace,
)
from sink_paged.window import SinkWindow, cdiv

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE_ROWS = 128  # of a query tile, which reads the keys once
THREADED_STORE = 8192  # keys times dims from which a store is worth waking threads


def prepare(dtype: torch.dtype) -> None:
    """Compile the kernels, or load them from the cache, before the first request.

    Raises:
        ValueError: no kernel for the dtype.
    """
    if dtype not in KINDS:
        raise ValueError(f"no CPU attention kernel for {dtype}")
    load_kernels()
    if dtype == torch.bfloat16:
        has_matrix_tiles()


class _ScratchLayout(NamedTuple):
    """Shape of a query tile, then sizes and offsets of scratch memory in bytes."""

    tile_tokens: int
    max_rows: int
    partial_bytes: int
    partials: int
    scratch: int
    scratch_bytes: int


@functools.cache
def _plan_scratch(
    group: int, head_size: int, num_threads: int, may_split: bool
) -> _ScratchLayout:
    tile_tokens = max(1, TILE_ROWS // group)
    max_rows = cdiv(tile_tokens * group, 16) * 16
    partial_bytes = max_rows * (4 * head_size + 8) if may_split else 0
    arrival_bytes = cdiv(8 * num_threads, 64) * 64
    scratch = arrival_bytes + 2 * num_threads * partial_bytes
    scratch_bytes = scratch_size(max_rows, head_size)
    return _ScratchLayout(
        tile_tokens, max_rows, partial_bytes, arrival_bytes, scratch, scratch_bytes
    )


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
            `block_size` and `head_size` are multiples of 16. In pages that a query
            attends, the slots of the text so far have been written; the others may
            hold anything, NaN included.
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
    _, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    if output.dim() == 2:
        output = output.view(-1, num_heads, head_size)
    dtype, element = query.dtype, query.element_size()
    query_token, query_head, _ = query.stride()
    output_token, output_head, _ = output.stride()
    cache_block, cache_head, _, _ = kv_cache.stride()
    num_requests, num_columns = block_table.shape
    table_row, _ = block_table.stride()
    matrix_tiles = (
        dtype == torch.bfloat16 and head_size % 32 == 0 and has_matrix_tiles()
    )
    rotation, rotation_row, rotary_dim = 0, 0, 0
    if sink_rotation is not None:
        rotation_row, _ = sink_rotation.stride()
        rotation, rotary_dim = sink_rotation.data_ptr(), sink_rotation.size(1)

    # Scratch memory of the call: arrivals | partial results | one part per thread.
    num_threads = torch.get_num_threads()
    may_split = num_requests * num_kv_heads < num_threads
    layout = _plan_scratch(num_heads // num_kv_heads, head_size, num_threads, may_split)
    tile_tokens, max_rows, partial_bytes, partials, scratch, scratch_bytes = layout
    arrivals = workspace.reserve(scratch + num_threads * scratch_bytes)
    ATTEND.pack_into(
        workspace.arguments,
        0,
        0,
        0,
        kv_cache.data_ptr(),
        cache_block * element,
        cache_head * element,
        KINDS[dtype],
        num_kv_heads,
        head_size,
        block_size,
        query.data_ptr(),
        query_token * element,
        query_head * element,
        output.data_ptr(),
        output_token * element,
        output_head * element,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        4 * table_row,
        num_columns,
        rotation,
        4 * rotation_row,
        rotary_dim,
        interleaved,
        num_requests,
        num_heads,
        window.sink_tokens,
        window.window_tokens,
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if sink_logits is None else sink_logits.data_ptr(),
        tile_tokens,
        max_rows,
        matrix_tiles,
        num_threads if may_split else 1,
        arrivals + scratch,
        scratch_bytes,
        arrivals,
        arrivals + partials,
        partial_bytes,
        scale,
        soft_cap,
    )
    run(load_kernels().attend, num_threads)


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
    _, num_kv_heads, block_size, _ = kv_cache.shape
    element, num_tokens = key.element_size(), min(len(key), len(slot_mapping))
    cache_block, cache_head, _, _ = kv_cache.stride()
    key_token, key_head, _ = key.stride()
    value_token, value_head, _ = value.stride()
    is_small = num_tokens * num_kv_heads * key.shape[-1] < THREADED_STORE
    num_threads = 1 if is_small else torch.get_num_threads()
    STORE.pack_into(
        workspace.arguments,
        0,
        0,
        0,
        kv_cache.data_ptr(),
        cache_block * element,
        cache_head * element,
        KINDS[key.dtype],
        num_kv_heads,
        key.shape[-1],
        block_size,
        key.data_ptr(),
        key_token * element,
        key_head * element,
        value.data_ptr(),
        value_token * element,
        value_head * element,
        slot_mapping.data_ptr(),
        num_tokens,
        cdiv(num_tokens, num_threads),
    )
    run(load_kernels().store, num_threads)


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
