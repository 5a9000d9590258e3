# SPDX-License-Identifier: Apache-2.0
"""What sink eviction brings for each platform of vLLM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm.platforms import current_platform


class Platform(NamedTuple):
    """Classes by path.

    Attributes:
        backend: the attention backend.
        worker: the worker.
        stock_worker: the worker of vLLM that it extends.
    """

    backend: str
    worker: str
    stock_worker: str


CPU = Platform(
    backend="sink_paged.attention.cpu_backend.SinkCPUAttentionBackend",
    worker="sink_paged.cpu_worker.SinkCPUWorker",
    stock_worker="vllm.v1.worker.cpu_worker.CPUWorker",
)
CUDA = Platform(
    backend="sink_paged.attention.triton_backend.SinkTritonAttentionBackend",
    worker="sink_paged.gpu_worker.SinkGPUWorker",
    stock_worker="vllm.v1.worker.gpu_worker.Worker",
)
KV_CACHE_DTYPES = frozenset(
    {"auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"}
)
"""Legal values of ``--kv-cache-dtype``."""


def find_platform() -> Platform | None:
    """What there is for the platform that vLLM runs on; None for any other."""
    if current_platform.is_cpu():
        return CPU
    return CUDA if current_platform.is_cuda() else None


def lacks_instructions(dtype: torch.dtype) -> bool:
    """Whether this is a CPU that computes matrix products of ``dtype`` in detours.

    By oneDNN's account: bfloat16 and float16 take AVX-512 or AMX. Without them a large
    product takes several times as long as in float32.
    """
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return current_platform.is_cpu() and dtype in supported and not supported[dtype]()
