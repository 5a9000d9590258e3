# SPDX-License-Identifier: Apache-2.0
"""One layer's calls of the CPU kernels, prepared once.

A decode of a small model takes microseconds a layer: what a layer keeps is packed for
the kernel when first seen, what a step shares once a step.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sink_paged.attention.arguments import (
    ATTEND_CALL,
    ATTEND_LAYER,
    LAYER,
    SIZE,
    STORE_CALL,
    STORE_LAYER,
)
from sink_paged.attention.kernel import scratch_size
from sink_paged.attention.launch import (
    Scratch,
    bind,
    has_matrix_tiles,
    load_kernels,
    reserve_scratch,
)
from sink_paged.attention.matmul import E4M3_FACTOR
from sink_paged.attention.simd import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32
from sink_paged.window import SinkWindow, cdiv

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
FP8_KINDS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
TILE_ROWS = 128  # of a query tile, which reads the keys once
THREADED_STORE = 8192  # keys times dims from which a store is worth waking threads


class Step(NamedTuple):
    """One step's batch, shared by the layers.

    Attributes:
        words: the part of `ATTEND_CALL` that describes the batch.
        tensors: those whose addresses `words` holds.
    """

    words: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor) -> Step:
        """The step of these tensors, see `cpu.sink_attention`."""
        num_reqs, num_columns = block_table.shape
        words = (
            query_start_loc.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            4 * block_table.stride(0),
            num_columns,
            num_reqs,
        )
        return cls(words, (query_start_loc, seq_lens, block_table))


class CacheWriter:
    """Writes keys and values of one layer; for one thread at a time."""

    def __init__(self, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        """See `cpu.write_kv`."""
        self._scales = (k_scale, v_scale)
        self._cache: Tensor | None = None
        self._arguments = ctypes.create_string_buffer(LAYER + STORE_LAYER.size)
        self._address = ctypes.addressof(self._arguments)

    def _bind(self, kv_cache: Tensor, dtype: torch.dtype) -> None:
        kernel, num_threads = load_kernels().store, torch.get_num_threads()
        STORE_LAYER.pack_into(
            self._arguments, LAYER, *_cache_arguments(kv_cache, dtype), *self._scales
        )
        self._num_threads, self._dtype = num_threads, dtype
        self._serial = bind(kernel, self._address, 1)
        self._parallel = bind(kernel, self._address, num_threads)
        self._token_size = kv_cache.shape[1] * kv_cache.shape[3] // 2
        self._cache = kv_cache

    def write(
        self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """As `cpu.write_kv`."""
        if kv_cache is not self._cache or key.dtype is not self._dtype:
            self._bind(kv_cache, key.dtype)
        num_tokens = min(key.shape[0], slot_mapping.shape[0])
        is_small = num_tokens * self._token_size < THREADED_STORE
        key_token, key_head, _ = key.stride()
        value_token, value_head, _ = value.stride()
        STORE_CALL.pack_into(
            self._arguments,
            0,
            0,
            0,
            key.data_ptr(),
            key_token,
            key_head,
            value.data_ptr(),
            value_token,
            value_head,
            slot_mapping.data_ptr(),
            num_tokens,
            num_tokens if is_small else cdiv(num_tokens, self._num_threads),
        )
        if is_small:
            self._serial()
        else:
            self._parallel()


class LayerAttention:
    """Attention of one layer, by the kernel; for one thread at a time."""

    def __init__(
        self,
        num_heads: int,
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
        """See `cpu.sink_attention`."""
        self.num_heads = num_heads
        self.window = window
        self.scale = scale
        self.interleaved = interleaved
        self.alibi_slopes = alibi_slopes
        self.soft_cap = soft_cap
        self.sink_logits = sink_logits
        self.k_scale = k_scale
        self.v_scale = v_scale
        self._cache: Tensor | None = None
        self._rotation: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._arguments = ctypes.create_string_buffer(SIZE)
        self._thread = 0
        self._scratch: Scratch | None = None
        self._arrivals: ctypes.Array[ctypes.c_int64] | None = None
        self._run: Callable[[], object]  # set by `_bind`

    def attend(
        self,
        query: Tensor,
        kv_cache: Tensor,
        output: Tensor,
        step: Step,
        sink_rotation: Tensor | None,
    ) -> None:
        """As `cpu.sink_attention`, of a batch described by `step`."""
        if (
            kv_cache is not self._cache
            or sink_rotation is not self._rotation
            or query.dtype is not self._dtype
            or threading.get_ident() != self._thread  # whose scratch memory it is
        ):
            self._bind(kv_cache, sink_rotation, query.dtype)
        query_token, query_head, _ = query.stride()
        strides = output.stride()
        ATTEND_CALL.pack_into(
            self._arguments,
            0,
            0,
            0,
            query.data_ptr(),
            query_token,
            query_head,
            output.data_ptr(),
            strides[0],
            strides[1] if len(strides) == 3 else self._head_size,
            *step.words,
        )
        self._run()

    def _bind(
        self, kv_cache: Tensor, sink_rotation: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Pack what stays; the number of threads is torch's at this time."""
        _, num_kv_heads, block_size, width = kv_cache.shape
        head_size = width // 2
        num_threads = torch.get_num_threads()
        group = self.num_heads // num_kv_heads
        tile_tokens = max(1, TILE_ROWS // group)
        max_rows = cdiv(tile_tokens * group, 16) * 16
        # Scratch memory: partial results | one part for each thread. The counts of
        # arrived parts are zero between calls, so they are no other layer's.
        partial_bytes = max_rows * (4 * head_size + 8) if num_threads > 1 else 0
        scratch = 2 * num_threads * partial_bytes
        scratch_bytes = scratch_size(max_rows, head_size)
        memory = reserve_scratch(scratch + num_threads * scratch_bytes)
        arrivals = (ctypes.c_int64 * num_threads)()
        rotation, rotation_row, rotary_dim = 0, 0, 0
        if sink_rotation is not None:
            rotation, rotary_dim = sink_rotation.data_ptr(), sink_rotation.shape[1]
            rotation_row = 4 * sink_rotation.stride(0)
        matrix_tiles = kv_cache.dtype == torch.bfloat16 and head_size % 32 == 0
        factor = E4M3_FACTOR if kv_cache.dtype == torch.float8_e4m3fn else 1.0
        slopes, logits = self.alibi_slopes, self.sink_logits
        ATTEND_LAYER.pack_into(
            self._arguments,
            LAYER,
            *_cache_arguments(kv_cache, dtype),
            group,
            rotation,
            rotation_row,
            rotary_dim,
            self.interleaved,
            self.window.sink_tokens,
            cdiv(self.window.sink_tokens, block_size),
            self.window.window_tokens,
            0 if slopes is None else slopes.data_ptr(),
            0 if logits is None else logits.data_ptr(),
            tile_tokens,
            max_rows,
            matrix_tiles and has_matrix_tiles(),
            num_threads,
            memory.address + scratch,
            scratch_bytes,
            ctypes.addressof(arrivals),
            memory.address,
            partial_bytes,
            self.scale * self.k_scale * factor,
            self.v_scale * factor,
            self.soft_cap,
        )
        address = ctypes.addressof(self._arguments)
        self._run = bind(load_kernels().attend, address, num_threads)
        self._cache, self._rotation, self._scratch = kv_cache, sink_rotation, memory
        self._dtype, self._head_size = dtype, head_size
        self._arrivals, self._thread = arrivals, threading.get_ident()


def _cache_arguments(kv_cache: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """`CACHE_LAYER` of a cache for queries, keys and values of a dtype.

    Raises:
        ValueError: the cache is neither of that dtype nor of 8 bits.
    """
    if dtype not in KINDS or kv_cache.dtype not in (dtype, *FP8_KINDS):
        raise ValueError(f"queries or keys of {dtype}, a cache of {kv_cache.dtype}")
    _, num_kv_heads, block_size, width = kv_cache.shape
    block, head, _, _ = kv_cache.stride()
    element = kv_cache.element_size()
    return (
        kv_cache.data_ptr(),
        block * element,
        head * element,
        (KINDS | FP8_KINDS)[kv_cache.dtype],
        KINDS[dtype],
        num_kv_heads,
        width // 2,
        block_size,
    )
