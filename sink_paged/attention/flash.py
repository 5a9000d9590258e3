# SPDX-License-Identifier: Apache-2.0
"""Sink attention of prefills through FlashAttention 3, where that is the faster route.

That is any step with a chunk of a prompt, the decodes in it too, on Hopper, for heads
of more than 64 dims.

FlashAttention attends the window, which is causal sliding-window attention over a block
table without a ring; a kernel of ours adds the sinks that have left the window, by the
log-sum-exp. That reads and writes the output once more, `4 * head_size` bytes of a
query head and token, which a long pass over the keys repays: on an H200 with heads of
128 dims, FlashAttention alone takes 0.5 to 0.6 of the time of `triton.sink_attention`.
Heads of 64 dims, and steps of decodes alone, are faster there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sink_paged.attention.triton import SINK_KEYS, layout, logit_factors
from sink_paged.attention.triton_add_sinks import add_sinks
from sink_paged.attention.triton_unroll import unroll
from sink_paged.window import SinkWindow, cdiv

ROWS = 64  # of a tile of `add_sinks`
LEAST_HEAD_SIZE = 65
DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def is_available() -> bool:
    """Whether vLLM has FlashAttention 3 for this device, a Hopper GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except ImportError:
        return False
    return bool(is_fa_version_supported(3))


def suits(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Whether FlashAttention takes such a layer, and is faster for it."""
    return (
        LEAST_HEAD_SIZE <= head_size <= 256
        and head_size % 8 == 0
        and dtype in DTYPES
        and cache_dtype == dtype
    )


class WindowTable(NamedTuple):
    """Where the window keys of a step's requests lie, in order.

    Attributes:
        block_table: int32 `[num_reqs, num_blocks]`, from the block on that holds the
            oldest key that a request's first query attends.
        lengths: int32 `[num_reqs]`, keys from that block's start to the text's end.
        max_length: no request has more.
    """

    block_table: Tensor
    lengths: Tensor
    max_length: int


def window_table(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    window: SinkWindow,
    block_size: int,
    max_query_len: int,
) -> WindowTable:
    """Unroll the rings of a step; needed once for all layers with this window.

    Args:
        query_start_loc: see `triton.sink_attention`, as for the other tensors.
        seq_lens: text tokens of each request.
        block_table: with rings behind the pinned columns.
        window: sink and window tokens.
        block_size: tokens of a block.
        max_query_len: no request has more rows.
    """
    num_requests, num_columns = block_table.shape
    longest = window.window_tokens + max_query_len + block_size - 1
    num_blocks = min(cdiv(longest, block_size), num_columns)
    table = block_table.new_empty(num_requests, num_blocks)
    lengths = torch.empty_like(seq_lens[:num_requests])
    unroll[(num_requests,)](
        block_table,
        query_start_loc,
        seq_lens,
        table,
        lengths,
        num_columns,
        num_blocks,
        window.window_tokens,
        block_table.stride(0),
        pinned=cdiv(window.sink_tokens, block_size),
        block_size=block_size,
        columns=128,
    )
    return WindowTable(table, lengths, num_blocks * block_size)


def attend_window(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    unrolled: WindowTable,
    *,
    window_tokens: int,
    scale: float,
    soft_cap: float,
    max_query_len: int,
) -> Tensor:
    """Sliding-window attention alone, by FlashAttention.

    Args:
        query: `[num_tokens, num_heads, head_size]`.
        keys: `[num_blocks, block_size, num_kv_heads, head_size]`.
        values: likewise.
        output: as `query`; written.
        query_start_loc: first row of each request.
        unrolled: the keys of each request.
        window_tokens: keys before its own that a query attends.
        scale: factor of the logits.
        soft_cap: 0 for none.
        max_query_len: no request has more rows.

    Returns:
        Log-sum-exps of the logits, float32 `[num_heads, num_tokens]`.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    _, norm = flash_attn_varlen_func(
        query,
        keys,
        values,
        out=output,
        max_seqlen_q=max_query_len,
        cu_seqlens_q=query_start_loc,
        max_seqlen_k=unrolled.max_length,
        seqused_k=unrolled.lengths,
        block_table=unrolled.block_table,
        causal=True,
        window_size=[window_tokens, 0],
        softmax_scale=scale,
        softcap=soft_cap,
        return_softmax_lse=True,
        fa_version=3,
    )
    return norm


def sink_attention(
    query: Tensor,
    kv_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    sink_rotation: Tensor | None,
    *,
    unrolled: WindowTable,
    window: SinkWindow,
    scale: float,
    interleaved: bool = False,
    soft_cap: float = 0.0,
    max_query_len: int,
) -> None:
    """`triton.sink_attention` without biases, learned logits and 8-bit caches.

    Args:
        query: see there, as for all that is not named here.
        kv_cache: in the dtype of `query`, bfloat16 or float16.
        output: `[num_tokens, num_heads, head_size]`, or flat heads; written.
        query_start_loc: first row of each request.
        seq_lens: text tokens of each request.
        block_table: with rings.
        sink_rotation: of the query for the sinks.
        unrolled: what `window_table` returned for the step.
        window: sink and window tokens.
        scale: factor of the logits.
        interleaved: rotate pairs `(2k, 2k + 1)`.
        soft_cap: 0 for none.
        max_query_len: no request has more rows.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    output = output.view(num_tokens, num_heads, head_size)
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    norm = attend_window(
        query,
        keys,
        values,
        output,
        query_start_loc,
        unrolled,
        window_tokens=window.window_tokens,
        scale=scale,
        soft_cap=soft_cap,
        max_query_len=max_query_len,
    )
    if not window.sink_tokens:
        return
    group = num_heads // num_kv_heads
    logit_scale, cap = logit_factors(scale, soft_cap)
    num_requests, num_columns = block_table.shape
    add_sinks[num_tokens * group // ROWS + num_requests, num_kv_heads](
        query,
        kv_cache,
        output,
        norm,
        query_start_loc,
        seq_lens,
        block_table,
        sink_rotation,
        logit_scale,
        cap,
        num_requests,
        num_columns,
        window.window_tokens,
        norm_head=norm.stride(0),
        rows=ROWS,
        sink_keys=SINK_KEYS,
        **layout(
            query,
            kv_cache,
            output,
            block_table,
            sink_rotation,
            window=window,
            interleaved=interleaved,
        ),
        num_warps=8 if head_size > 128 else 4,  # or registers are spilled
    )
