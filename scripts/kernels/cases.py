# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes of heads, batches, lengths, types, and beside whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kernels.shapes import SHAPES
from sink_paged.attention.cpu_backend import FP8_DTYPES


@dataclass(frozen=True)
class Case:
    """One measured point.

    `resident` counts the keys of a request's last query; 0 is a write of new keys and
    values to the cache. `kv_cache_dtype` is that of vLLM's flag; `peer` is whom ours is
    compared with: stock, or ours with a cache of `dtype`.
    """

    shape: str
    batch: int
    tokens: int
    resident: int
    dtype: str
    block_size: int
    kv_cache_dtype: str = "auto"
    peer: str = "stock"

    @property
    def query_dtype(self) -> torch.dtype:
        """Dtype of queries, new keys and values, outputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the cache."""
        return FP8_DTYPES.get(self.kv_cache_dtype, self.query_dtype)

    @property
    def isa(self) -> str:
        """What stock vLLM would run it with.

        Raises:
            NotImplementedError: it has no kernel here.
        """
        head_size = SHAPES[self.shape][2]
        isa: str = _get_attn_isa(
            self.query_dtype, self.block_size, head_size, self.kv_cache_dtype
        )
        return isa


def cases(dtype: str, block_size: int, shapes: list[str], quick: bool) -> list[Case]:
    """The sweep: decodes over batch and resident keys, prefills at 2048, writes."""
    residents = [2048] if quick else [512, 2048, 4096]
    batches = [1, 8] if quick else [1, 8, 32]
    return [
        *(
            Case(shape, batch, 1, resident, dtype, block_size)
            for shape in shapes
            for batch in batches
            for resident in residents
        ),
        *(
            Case(shape, 1, tokens, 2048, dtype, block_size)
            for shape in shapes
            for tokens in ([128] if quick else [128, 512])
        ),
        *(
            Case(shape, batch, tokens, 0, dtype, block_size)
            for shape in shapes
            for batch, tokens in ([(8, 1)] if quick else [(1, 1), (32, 1), (1, 512)])
        ),
    ]


def peers(dtype: str, block_size: int, kv_cache_dtype: str, shape: str) -> list[str]:
    """Whom ours is compared with."""
    if kv_cache_dtype == "auto":
        return ["stock"]
    try:
        _ = Case(shape, 1, 1, 1, dtype, block_size, kv_cache_dtype).isa
    except NotImplementedError as reason:
        print(f"{dtype:9s}{shape}: no stock vLLM here: {reason}")
        return ["ours"]
    return ["ours", "stock"]
