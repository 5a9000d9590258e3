# SPDX-License-Identifier: Apache-2.0
"""Sink attention on GPUs, in Triton, on vLLM's packed paged cache.

Prefill chunks and decodes run in one launch; cut-off sinks and window in one online
softmax. The floor of a decode is one read of the resident keys and values, `2 *
head_size * element_size * (S + R + 1)` bytes per KV head and stream; a partly expired
block is masked before it is read, and rows of a KV head share the read. The floor of a
prefill is `4 * head_size * (S + R + 1)` operations per query head and token.

Steps with a prompt's chunk have another route for large heads on Hopper, see
:mod:`sink_paged.attention.flash`.

A launch depends on shapes and Python integers alone, and nothing is read back from the
device, so calls can be captured in CUDA graphs.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sink_paged.attention.triton_attend import attend
from sink_paged.attention.triton_merge import merge
from sink_paged.window import SinkWindow, cdiv

MAX_SPLITS = 32
MAX_ROWS = 128  # of a tile
SINK_KEYS = 16  # at a time; more sinks are a loop, not more memory
LOG2_E = math.log2(math.e)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(number: int) -> int:
    """The next power of two that is not less, at least 16, what `tl.dot` takes."""
    return max(16, 1 << (number - 1).bit_length())


def logit_factors(scale: float, soft_cap: float) -> tuple[float, float | None]:
    """`logit_scale` and `soft_cap` of `triton_tile.fold`."""
    if soft_cap:
        return 2 * LOG2_E * scale / soft_cap, soft_cap * LOG2_E
    return LOG2_E * scale, None


def layout(
    query: Tensor,
    kv_cache: Tensor,
    output: Tensor,
    block_table: Tensor,
    sink_rotation: Tensor | None,
    *,
    window: SinkWindow,
    interleaved: bool,
) -> dict[str, Any]:
    """Arguments by which a kernel finds its way in `sink_attention`'s tensors."""
    num_heads, head_size = query.shape[1:]
    rotary_dim = 0 if sink_rotation is None else sink_rotation.shape[1]
    return {
        "query_token": query.stride(0),
        "query_head": query.stride(1),
        "output_token": output.stride(0),
        "output_head": output.stride(1),
        "cache_block": kv_cache.stride(0),
        "cache_head": kv_cache.stride(1),
        "cache_slot": kv_cache.stride(2),
        "table_row": block_table.stride(0),
        "rotation_row": 0 if sink_rotation is None else sink_rotation.stride(0),
        "sink_tokens": window.sink_tokens,
        "group": num_heads // kv_cache.shape[1],
        "head_size": head_size,
        "padded": power_of_two(head_size),
        "rotary_dim": rotary_dim,
        "half_padded": power_of_two(max(1, rotary_dim // 2)),
        "rest_padded": power_of_two(max(1, head_size - rotary_dim)),
        "interleaved": interleaved,
        "block_size": kv_cache.shape[2],
    }


class _Launch(NamedTuple):
    """Shape of a tile, and how it is run."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@functools.cache
def _plan(rows: int, head_size: int, element: int) -> _Launch:
    """Tile for at most `rows` rows: what was fastest on an H200, in 99 KiB at most.

    Many small programs keep the memory busy in a decode of few rows, many rows share a
    key in a prefill. A float32 product is three TF32 ones and needs more registers.
    """
    padded = power_of_two(head_size)
    most_rows = MAX_ROWS if element < 4 else 32
    rows = min(power_of_two(rows), most_rows * 128 // max(128, padded))
    tile_bytes = 8 << 10 if element == 4 and rows > 16 else 16 << 10
    most_keys = 128 if rows == 64 else 64
    keys = min(most_keys, max(16, tile_bytes // (padded * element)))
    if rows == 16 and element < 4:
        return _Launch(rows, keys, 2, 4)
    many = rows * padded > 64 * 128 or padded * element > 512
    return _Launch(rows, keys, 8 if many else 4, 3)


class Workspace:
    """Memory for the partial results of split-key decodes, made once.

    Attributes:
        output: float32 `[programs * 3 // 2 * rows, head_size]`.
        norm: float32 `[programs * 3 // 2 * rows]`, base-2 logarithms.
        programs: how many programs the window parts of a split launch have at most.
        max_query_len: the most tokens of a decode.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device,
        *,
        max_query_len: int = 1,
        programs: int | None = None,
    ) -> None:
        """Allocate; the size depends on the device, not on the number of streams.

        Args:
            num_heads: query heads.
            num_kv_heads: KV heads.
            head_size: dims of a head.
            device: of the kernels.
            max_query_len: tokens of a decode, more than 1 with speculation.
            programs: programs that fill the device; by default four for each of its
                multiprocessors, or two with many rows, whose results are large.
        """
        self.max_query_len = max_query_len
        group = num_heads // num_kv_heads
        rows = min(MAX_ROWS, power_of_two(max_query_len * group))
        few = rows <= 32
        self.programs = programs or (4 if few else 2) * _multiprocessors(device)
        # The sinks are a part of their own beside two or more.
        size = self.programs * 3 // 2 * rows
        self.output = torch.empty(size, head_size, dtype=torch.float32, device=device)
        self.norm = torch.empty(size, dtype=torch.float32, device=device)

    def splits(self, programs: int, rows: int, key_tiles: int) -> int:
        """Into how many parts, a power of two, to split the keys of a window.

        Args:
            programs: of the launch, unsplit.
            rows: of a tile.
            key_tiles: that a window needs at most.
        """
        room = min(self.programs, self.norm.numel() * 2 // 3 // rows)
        parts = min(MAX_SPLITS, room // programs, key_tiles)
        return 1 << (parts.bit_length() - 1) if parts > 1 else 1


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_query_len: int,
    workspace: Workspace | None,
) -> None:
    """Attend sinks and window of every query of a batch, prefills and decodes alike.

    Args:
        query: `[num_tokens, num_heads, head_size]`, float32, bfloat16 or float16,
            rotated at its text position; rows may be strided. Rows behind
            `query_start_loc[-1]` are padding and ignored.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, keys then
            values in the last dim, which is contiguous; other strides are free. In
            query's dtype, float8_e4m3fn or float8_e5m2. `block_size` is a multiple of
            16. In pages that a query attends, the slots of the text so far have been
            written; the others may hold anything, NaN included.
        output: `[num_tokens, num_heads, head_size]`, or flat heads; written.
        query_start_loc: int32 `[num_reqs + 1]`, first row of each request, not falling.
        seq_lens: int32 `[num_reqs]`, text tokens including this step's: the rows of a
            request are its last positions. Ignored where a request has no rows.
        block_table: int32 `[num_reqs, num_columns]`, a ring behind the pinned columns
            (`BlockWindow.column`), contiguous in a row.
        sink_rotation: float32 `[max_tokens, rotary_dim]`, cosines then sines of the
            query's second rotation, by `min(i, C) - i`; None without rotary.
        window: sink and window tokens, less than 2^31 together.
        scale: factor of the logits.
        interleaved: rotate pairs `(2k, 2k + 1)` instead of neox halves.
        alibi_slopes: float32 `[num_heads]`, or None.
        soft_cap: `cap * tanh(logit / cap)` before the ALiBi bias; 0 for none.
        sink_logits: float32 `[num_heads]`, a learned logit in the denominator only.
        k_scale: float32 scalar on the device, factor of the cached keys, or None.
        v_scale: float32 scalar on the device, factor of the cached values, or None.
        max_query_len: no request has more rows.
        workspace: lets decodes of few streams share the keys of a stream among
            programs; None never splits.
    """
    num_tokens, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    num_requests, num_columns = block_table.shape
    if output.dim() == 2:
        output = output.view(-1, num_heads, head_size)
    group = num_heads // num_kv_heads
    decode_len = 1 if workspace is None else workspace.max_query_len
    most_rows = min(max_query_len, decode_len) * group
    one_tile = max_query_len <= decode_len and most_rows <= MAX_ROWS
    padded = power_of_two(head_size)
    if not one_tile:  # half the rows where that gives the device more to do
        full = num_tokens * num_heads >= MAX_ROWS * _multiprocessors(query.device)
        most_rows = MAX_ROWS if full and padded > 64 else MAX_ROWS // 2
    rows, keys, num_warps, num_stages = _plan(
        most_rows, head_size, query.element_size()
    )
    one_tile = one_tile and most_rows <= rows
    splits, partial_output, partial_norm = 1, None, None
    if not one_tile:
        tiles = num_tokens * group // rows + num_requests
    else:
        tiles = num_requests
        if workspace is not None:
            key_tiles = cdiv(window.window_tokens + max_query_len + block_size, keys)
            splits = workspace.splits(tiles * num_kv_heads, rows, key_tiles)
            if splits > 1:
                partial_output, partial_norm = workspace.output, workspace.norm
    logit_scale, cap = logit_factors(scale, soft_cap)
    parts = splits + 1 if splits > 1 and window.sink_tokens else splits
    attend[tiles, num_kv_heads, parts](
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
        cap,
        num_requests,
        splits.bit_length() - 1,
        num_columns,
        window.window_tokens,
        rows=rows,
        keys=keys,
        sink_keys=SINK_KEYS,
        one_tile=one_tile,
        is_split=splits > 1,
        **layout(
            query,
            kv_cache,
            output,
            block_table,
            sink_rotation,
            window=window,
            interleaved=interleaved,
        ),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if splits > 1:
        merge[num_requests, num_kv_heads, most_rows](
            partial_output,
            partial_norm,
            output,
            query_start_loc,
            output.stride(0),
            output.stride(1),
            group=group,
            head_size=head_size,
            padded=padded,
            rows=rows,
            parts=parts,
            parts_padded=1 << (parts - 1).bit_length(),
            num_warps=4,
        )
