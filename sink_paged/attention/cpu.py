# SPDX-License-Identifier: Apache-2.0
"""Sink attention on the CPU: vLLM's paged cache, torch's own OpenMP threads.

A page, the interior of a (block, kv head), holds keys, then values, both in tiles that
are read front to back: one vector is one dim of 16 keys, or 16 dims of one value.
bfloat16 comes in pairs, of dims for keys and of tokens for values, which is the order
of the CPU's bfloat16 dot products, and so do 8 bits, to be widened as the halves of 16;
`pair` is 1 otherwise::

    keys    [block_size / 16, head_size / pair, 16 tokens, pair]
    values  [head_size / 16, block_size / pair, 16 dims, pair]
"""

import torch
from torch import Tensor

from sink_paged.attention.launch import has_matrix_tiles, load_kernels
from sink_paged.attention.layer import KINDS, CacheWriter, LayerAttention, Step
from sink_paged.window import SinkWindow


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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Attend sinks and window of every query of a batch, prefills and decodes alike.

    Args:
        query: `[num_tokens, num_heads, head_size]`, float32, bfloat16 or float16,
            rotated at its text position; rows may be strided. Rows behind
            `query_start_loc[-1]` are padding and ignored.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]` of query's
            dtype, float8_e4m3fn or float8_e5m2, written by `write_kv`; contiguous
            inside a (block, head).
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
        k_scale: factor of the cached keys.
        v_scale: factor of the cached values.
    """
    attention = LayerAttention(
        query.shape[1],
        window=window,
        scale=scale,
        interleaved=interleaved,
        alibi_slopes=alibi_slopes,
        soft_cap=soft_cap,
        sink_logits=sink_logits,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    step = Step.of(query_start_loc, seq_lens, block_table)
    attention.attend(query, kv_cache, output, step, sink_rotation)


def write_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Store the keys and values of a step's tokens in their slots.

    A cache of 8 bits takes `key / k_scale` and `value / v_scale`, divided in float32,
    rounded to nearest even and to the largest number of the dtype at most.

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`, rotated at its text position.
        value: `[num_tokens, num_kv_heads, head_size]`.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`; written.
        slot_mapping: int64 `[num_tokens]`, `block * block_size + offset`; negative
            slots are padding and skipped.
        k_scale: of a cache of 8 bits.
        v_scale: of a cache of 8 bits.
    """
    CacheWriter(k_scale, v_scale).write(key, value, kv_cache, slot_mapping)


def pair_size(dtype: torch.dtype) -> int:
    """`pair` of a cache's dtype."""
    return 1 if dtype in (torch.float32, torch.float16) else 2


def read_kv(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values out of the cache.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.

    Returns:
        Keys and values, each `[num_blocks, num_kv_heads, block_size, head_size]`.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    head_size = width // 2
    pair = pair_size(kv_cache.dtype)
    pages = kv_cache.reshape(num_blocks, num_kv_heads, 2, block_size * head_size)
    keys, values = pages.unbind(2)
    shape = (num_blocks, num_kv_heads, block_size, head_size)
    keys = keys.reshape(*shape[:2], block_size // 16, head_size // pair, 16, pair)
    values = values.reshape(*shape[:2], head_size // 16, block_size // pair, 16, pair)
    return (
        keys.permute(0, 1, 2, 4, 3, 5).reshape(shape).clone(),
        values.permute(0, 1, 3, 5, 2, 4).reshape(shape).clone(),
    )
