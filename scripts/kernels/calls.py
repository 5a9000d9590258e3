# SPDX-License-Identifier: Apache-2.0
"""Our kernels for the CPU and vLLM's, each ready to be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from vllm import _custom_ops as ops

from kernels.cases import Case
from kernels.shapes import SHAPES
from sink_paged.attention.layer import CacheWriter, LayerAttention, Step
from sink_paged.huge_pages import clear_to_huge_pages
from sink_paged.window import BlockWindow, SinkWindow

SINK_TOKENS = 4


def make_calls(
    case: Case, huge_pages: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A call of our kernel, and one of its peer."""
    by_stock = case.peer == "stock"
    other = case if by_stock else replace(case, kv_cache_dtype="auto")
    if not case.resident:
        return make_write(case, False), make_write(other, by_stock)
    ours = make_ours(case, huge_pages)
    if by_stock:
        return ours, make_stock(other)
    return ours, make_ours(other, huge_pages)


def make_ours(case: Case, huge_pages: bool) -> Callable[[], None]:
    """A call of this package's kernel on streams far past their window."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    block_size = case.block_size
    window = SinkWindow(SINK_TOKENS, case.resident - SINK_TOKENS - 1)
    policy = BlockWindow(window, block_size)
    columns = policy.max_blocks(case.tokens)
    seq_len = 10 * case.resident + 37
    num_blocks = 1 + case.batch * columns
    block = torch.randn(1, kv_heads, block_size, 2 * head_size).to(case.cache_dtype)
    cache = torch.zeros(num_blocks, *block.shape[1:], dtype=case.cache_dtype)
    if huge_pages:
        clear_to_huge_pages(cache)
    cache.copy_(block.expand_as(cache))
    table = torch.randperm(num_blocks - 1)[: case.batch * columns] + 1
    table = table.view(case.batch, columns).int()
    query = torch.randn(case.batch * case.tokens, heads, head_size)
    query = query.to(case.query_dtype)
    output = torch.empty_like(query)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.tokens
    seq_lens = torch.full((case.batch,), seq_len, dtype=torch.int32)
    angles = torch.randn(len(query), head_size // 2)
    rotation = torch.cat([angles.cos(), angles.sin()], dim=1)

    attention = LayerAttention(heads, window=window, scale=head_size**-0.5)
    step = Step.of(starts, seq_lens, table)

    def call() -> None:
        attention.attend(query, cache, output, step, rotation)

    return call


def make_stock(case: Case) -> Callable[[], None]:
    """A call of vLLM's kernel on sequences of the resident length."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    seq_len = case.resident + case.tokens - 1
    columns = -(-seq_len // case.block_size)
    num_blocks = 1 + case.batch * columns
    cache = torch.randn(1, kv_heads, 2 * case.block_size, head_size).to(
        case.cache_dtype
    )
    if case.kv_cache_dtype != "auto":
        cache = cache.view(torch.uint8)
    cache = cache.repeat(num_blocks, 1, 1, 1)
    key_cache, value_cache = cache.chunk(2, dim=2)
    table = (torch.randperm(num_blocks - 1) + 1).view(case.batch, columns).int()
    query = torch.randn(case.batch * case.tokens, heads, head_size)
    query = query.to(case.query_dtype)
    output = torch.empty_like(query)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.tokens
    seq_lens = torch.full((case.batch,), seq_len, dtype=torch.int32)
    # A prefill attends a window in both kernels; a decode its whole sequence.
    sliding = -1 if case.tokens == 1 else case.resident
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_size,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=sliding,
        isa=case.isa,
        enable_kv_split=True,
        kv_cache_dtype=case.kv_cache_dtype,
    )

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=seq_lens,
            scale=head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=sliding,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
            kv_cache_dtype=case.kv_cache_dtype,
        )

    return call


def make_write(case: Case, by_stock: bool) -> Callable[[], None]:
    """A call of either kernel that writes new keys and values."""
    _, kv_heads, head_size = SHAPES[case.shape]
    block_size = case.block_size
    num_blocks = 1 + case.batch * -(-case.tokens // block_size)
    cache = torch.zeros(num_blocks, kv_heads, block_size, 2 * head_size)
    cache = cache.to(case.cache_dtype)
    blocks = torch.randperm(num_blocks - 1).view(case.batch, -1, 1) + 1
    slots = blocks * block_size + torch.arange(block_size)
    slots = slots.view(case.batch, -1)[:, : case.tokens].reshape(-1).contiguous()
    fused = torch.randn(len(slots), 2, kv_heads, head_size).to(case.query_dtype)
    key, value = fused.unbind(1)
    if not by_stock:
        writer = CacheWriter()
        return lambda: writer.write(key, value, cache, slots)
    if case.kv_cache_dtype != "auto":
        cache = cache.view(torch.uint8)
    halves = cache.view(num_blocks, kv_heads, 2 * block_size, head_size)
    key_cache, value_cache = halves.chunk(2, dim=2)
    isa = case.isa
    return lambda: ops.cpu_attn_reshape_and_cache(
        key,
        value,
        key_cache,
        value_cache,
        slots,
        isa,
        kv_cache_dtype=case.kv_cache_dtype,
    )
