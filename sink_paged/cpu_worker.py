# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with streams."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from sink_paged.huge_pages import clear_to_huge_pages
from sink_paged.worker import StreamWorker


class SinkCPUWorker(StreamWorker, CPUWorker):
    """CPU worker whose streams keep sinks and a window."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache, in huge pages where the system has them."""
        super().initialize_from_config(kv_cache_config)
        caches = self.model_runner.kv_caches
        storages = {cache.untyped_storage().data_ptr(): cache for cache in caches}
        for cache in storages.values():
            clear_to_huge_pages(cache)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; requests still in their prompt keep their random state.

        vLLM draws for them too and then winds their generators back, which CPU
        generators cannot. Here they are out of its sight until it is done.
        """
        if self.use_v2_model_runner:  # draws from seeds, not generators
            return super().sample_tokens(*args, **kwargs)
        runner = self.model_runner
        generators = runner.input_batch.generators
        if not generators:
            return super().sample_tokens(*args, **kwargs)
        unfinished = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        kept = {row: generators.pop(row) for row in list(generators) if unfinished[row]}
        try:
            return super().sample_tokens(*args, **kwargs)
        finally:
            generators.update(kept)
