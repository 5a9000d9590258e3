# SPDX-License-Identifier: Apache-2.0
"""Eager float32 sink attention on a paged cache: the oracle of every kernel.

Written from the definition, one request, head and query at a time, and slow. The
kernels have the same signature and must agree with it up to float rounding.
"""

import torch
from torch import Tensor

from sink_paged.attention.cpu import read_kv
from sink_paged.rotary import rotate
from sink_paged.window import SinkWindow


def ring_column(block: int, pinned: int, num_columns: int) -> int:
    """Column of the block table that holds block `block` of the text."""
    if block < pinned:
        return block
    return pinned + (block - pinned) % (num_columns - pinned)


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
    """Attend sinks and window of every query; arguments as `cpu.sink_attention`."""
    keys, values = read_kv(kv_cache)
    num_heads, num_kv_heads = query.shape[1], keys.shape[1]
    block_size = keys.shape[2]
    sinks, recent = window.sink_tokens, window.window_tokens
    pinned = -(-sinks // block_size)
    for request, seq_len in enumerate(seq_lens.tolist()):
        first_row, end_row = query_start_loc[request : request + 2].tolist()
        for row in range(first_row, end_row):
            i = seq_len - end_row + row
            cut_off = range(min(sinks, i - recent))
            attended = [*cut_off, *range(max(i - recent, 0), i + 1)]
            slots = [
                (
                    block_table[
                        request,
                        ring_column(j // block_size, pinned, block_table.shape[1]),
                    ],
                    j % block_size,
                )
                for j in attended
            ]
            blocks = torch.tensor([block for block, _ in slots])
            offsets = torch.tensor([offset for _, offset in slots])
            # [num_kv_heads, attended, head_size]
            k = keys[blocks, :, offsets].transpose(0, 1).float() * k_scale
            v = values[blocks, :, offsets].transpose(0, 1).float() * v_scale
            k = k.repeat_interleave(num_heads // num_kv_heads, 0)
            v = v.repeat_interleave(num_heads // num_kv_heads, 0)

            q = query[row].float()  # [num_heads, head_size]
            q_sink = q
            if sink_rotation is not None:
                cos, sin = sink_rotation[row].chunk(2)
                q_sink = rotate(q, cos, sin, interleaved=interleaved)
            num_sinks = len(cut_off)
            logits = torch.cat(
                [
                    torch.einsum("hd,hkd->hk", q_sink, k[:, :num_sinks]),
                    torch.einsum("hd,hkd->hk", q, k[:, num_sinks:]),
                ],
                dim=1,
            )
            logits = logits * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            if alibi_slopes is not None:
                distances = [
                    (min(i, sinks + recent) if n < num_sinks else i) - j
                    for n, j in enumerate(attended)
                ]
                logits = logits - alibi_slopes[:, None] * torch.tensor(distances)
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[:, None].float()], dim=1)
            weights = logits.softmax(dim=1)[:, : len(attended)]
            attention = torch.einsum("hk,hkd->hd", weights, v)
            output[row] = attention.view(output[row].shape).to(output.dtype)
