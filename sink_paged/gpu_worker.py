# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with streams."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from sink_paged.worker import StreamWorker


class SinkGPUWorker(StreamWorker, Worker):
    """CUDA worker whose streams keep sinks and a window, on either model runner."""
