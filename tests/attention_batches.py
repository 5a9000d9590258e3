# SPDX-License-Identifier: Apache-2.0
"""Batches of streams for the tests of the attention kernels."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sink_paged.attention import cpu, flash, reference
from sink_paged.window import BlockWindow, SinkWindow, cdiv

# float32: both sides accumulate in float32, in another order; relative error about
# sqrt(keys) * 6e-8 of sums near 1. bfloat16 and float16: both round one float32 result
# to the dtype, so they differ by at most one step of the dtype at the result's size,
# plus, where the kernel multiplies in bfloat16, the rounding of weights (2**-9 each,
# averaged over the keys) and of the rotated query (2**-9 of a logit).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# With a cache of 8 bits the reference reads the same rounded keys and values, so no
# tolerance covers what they lose.
DTYPES = list(TOLERANCE)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SAME = [(dtype, dtype) for dtype in DTYPES]
"""Dtypes of queries and cache."""
CACHES = [*SAME, (torch.float32, E4M3), (torch.bfloat16, E5M2)]
ALL_CACHES = [*SAME, *itertools.product(DTYPES, (E4M3, E5M2))]


def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a cache of a dtype of 8 bits holds of keys or values; by torch alone."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def store(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """`cpu.write_kv` without its kernel: the inverse of `cpu.read_kv`."""
    block_size = kv_cache.shape[2]
    keys, values = cpu.read_kv(kv_cache)
    written = slots >= 0
    blocks, offsets = slots[written] // block_size, slots[written] % block_size
    keys[blocks, :, offsets] = key[written]
    values[blocks, :, offsets] = value[written]
    pair = cpu.pair_size(kv_cache.dtype)
    key_tiles = keys.unflatten(2, (-1, 16)).unflatten(4, (-1, pair))
    value_tiles = values.unflatten(2, (-1, pair)).unflatten(4, (-1, 16))
    parts = (
        key_tiles.permute(0, 1, 2, 4, 3, 5).flatten(2),
        value_tiles.permute(0, 1, 4, 2, 5, 3).flatten(2),
    )
    kv_cache.copy_(torch.cat(parts, dim=2).view(kv_cache.shape))


def window_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    unrolled: flash.WindowTable,
    *,
    window_tokens: int,
    scale: float,
    soft_cap: float,
    max_query_len: int,
) -> Tensor:
    """Stands in for `flash.attend_window` where there is no FlashAttention."""
    num_tokens, num_heads, _ = query.shape
    norms = torch.full((num_heads, num_tokens), math.nan)
    group = num_heads // keys.shape[2]
    for request, length in enumerate(unrolled.lengths.tolist()):
        begin, end = query_start_loc[request : request + 2].tolist()
        assert end - begin <= max_query_len
        assert length <= unrolled.max_length
        blocks = unrolled.block_table[request, : cdiv(length, keys.shape[1])].long()
        key, value = (
            cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, 1)
            for cache in (keys, values)
        )
        logits = scale * torch.einsum("qhd,khd->hqk", query[begin:end].float(), key)
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        at = torch.arange(length - (end - begin), length)[:, None]
        seen = torch.arange(length)[None]
        visible = (seen <= at) & (seen >= at - window_tokens)
        logits = logits.masked_fill(~visible, -math.inf)
        norms[:, begin:end] = logits.logsumexp(-1)
        weights = torch.softmax(logits, -1)
        value = value.nan_to_num()  # of keys that no query sees
        output[begin:end] = torch.einsum("hqk,khd->qhd", weights, value).to(
            output.dtype
        )
    return norms


@dataclass
class Batch:
    """A batch of streams in a cache whose unused slots are NaN.

    `chunks` are `(tokens of this step, text tokens with them)` of each request.
    """

    chunks: list[tuple[int, int]]
    window: SinkWindow
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # `dtype` unless given
    rotary_dim: int = 0
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        policy = BlockWindow(self.window, self.block_size)
        columns = policy.max_blocks(max(tokens for tokens, _ in self.chunks))
        num_blocks = 1 + len(self.chunks) * columns
        # A block stride larger than the block, as vLLM's padded pages have.
        shape = (num_blocks, self.num_kv_heads + 1, self.block_size, 2 * self.head_size)
        cache_dtype = self.cache_dtype or self.dtype
        is_fp8 = cache_dtype in (E4M3, E5M2)
        storage = torch.full(shape, math.nan).to(cache_dtype)
        self.kv_cache = storage[:, : self.num_kv_heads]
        self.block_table = torch.zeros(len(self.chunks), columns, dtype=torch.int32)
        # Texts by request: keys and values, [seq_len, num_kv_heads, head_size].
        self.texts: list[tuple[Tensor, Tensor]] = []
        free = iter(torch.randperm(num_blocks - 1, generator=generator).add(1).tolist())
        all_slots = []
        for request, (tokens, seq_len) in enumerate(self.chunks):
            key = randn(seq_len, self.num_kv_heads, self.head_size).to(self.dtype)
            value = randn(seq_len, self.num_kv_heads, self.head_size).to(self.dtype)
            self.texts.append((key, value))
            slots = torch.full((seq_len,), -1)
            total = -(-seq_len // self.block_size)
            held = {
                *range(min(policy.pinned_blocks, total)),
                *range(policy.first_window_block(seq_len - tokens), total),
            }
            for block in sorted(held):
                number = next(free)
                self.block_table[request, policy.column(block, columns)] = number
                begin = block * self.block_size
                end = min(begin + self.block_size, seq_len)
                slots[begin:end] = number * self.block_size + torch.arange(end - begin)
            all_slots.append(slots)
        keys, values = (torch.cat(texts) for texts in zip(*self.texts, strict=True))
        if is_fp8:
            self.options = {"k_scale": 0.3, "v_scale": 1.7} | self.options
            keys = quantise(keys, self.options["k_scale"], cache_dtype)
            values = quantise(values, self.options["v_scale"], cache_dtype)
        store(keys, values, self.kv_cache, torch.cat(all_slots))
        lengths = torch.tensor([0, *(tokens for tokens, _ in self.chunks)])
        self.query_start_loc = lengths.cumsum(0).int()
        self.seq_lens = torch.tensor([end for _, end in self.chunks], dtype=torch.int32)
        num_tokens = int(self.query_start_loc[-1]) + 2  # two padded rows
        # Strided rows, as the split of a fused projection has.
        width = self.num_heads + 2 * self.num_kv_heads
        self.query = randn(num_tokens, width, self.head_size).to(self.dtype)
        self.query = self.query[:, : self.num_heads]
        self.sink_rotation = None
        if self.rotary_dim:
            angles = 3 * randn(num_tokens, self.rotary_dim // 2)
            self.sink_rotation = torch.cat([angles.cos(), angles.sin()], dim=1)

    def run(self, attention: Any) -> Tensor:
        """Output `[num_tokens, num_heads, head_size]` of either implementation."""
        output = torch.full(self.query.shape, 7.0, dtype=self.dtype)
        attention(
            self.query,
            self.kv_cache,
            output,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.sink_rotation,
            window=self.window,
            scale=self.head_size**-0.5,
            **self.options,
        )
        return output

    def check(self) -> None:
        """The kernel agrees with the reference; padded rows stay as they were."""
        expected = self.run(reference.sink_attention).float()
        actual = self.run(cpu.sink_attention).float()
        assert not expected.isnan().any()
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        assert (actual[-2:] == 7.0).all()


MIXED = [(1, 100), (30, 33), (1, 7), (1, 1), (17, 300), (40, 40), (1, 65), (3, 66)]
OPTIONS: dict[str, dict[str, Any]] = {
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.01, 1.0])},
    "soft_cap": {"soft_cap": 2.0},
    "soft_cap_large": {"soft_cap": 50.0},
    "sink_logits": {"sink_logits": torch.tensor([-3.0, 0.0, 2.0, 40.0])},
    "interleaved": {"interleaved": True},
    "all": {
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.01, 1.0]),
        "soft_cap": 5.0,
        "sink_logits": torch.tensor([-3.0, 0.0, 2.0, 4.0]),
        "interleaved": True,
    },
}


@st.composite
def batches(
    draw: st.DrawFn, caches: Sequence[tuple[torch.dtype, torch.dtype]] = ALL_CACHES
) -> Batch:
    """Any batch of up to four streams."""
    chunks = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.one_of(st.just(1), st.integers(1, 25)))
        chunks.append((tokens, tokens + draw(st.integers(0, 300))))
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.integers(1, 5))
    head_size = draw(st.sampled_from([16, 32, 80]))
    rotary_dim = draw(st.sampled_from([0, 8, head_size]))
    options: dict[str, Any] = {"interleaved": draw(st.booleans())}
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.linspace(0.01, 1.0, num_heads)
    if draw(st.booleans()):
        options["soft_cap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        options["sink_logits"] = torch.linspace(-2.0, 2.0, num_heads)
    return Batch(
        chunks,
        SinkWindow(draw(st.sampled_from([0, 1, 4, 17, 40])), draw(st.integers(1, 150))),
        num_heads,
        num_kv_heads,
        head_size,
        draw(st.sampled_from([16, 32, 48, 128])),
        *draw(st.sampled_from(caches)),
        rotary_dim,
        draw(st.integers(0, 1000)),
        options,
    )
