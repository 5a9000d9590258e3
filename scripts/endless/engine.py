# SPDX-License-Identifier: Apache-2.0
"""vLLM in three processes, the memory of each in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from load.server import role_of
from streams.engine import Requests, Statistics
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

SINK_TOKENS = 4
CHUNK = 2048
"""Tokens that a step reads."""


class Engine(Requests):
    """vLLM in three processes, stepped from here; texts are detokenized, as served."""

    def __init__(self, model: str, window: int, streams: int, stock: int) -> None:
        """Start it.

        Args:
            model: folder of the model.
            window: tokens of a stream's window, without the sinks.
            streams: most of them at a time.
            stock: context length of a stock engine instead, or 0.
        """
        options: dict[str, Any] = {}
        if stock:
            options["hf_overrides"] = {"max_position_embeddings": stock}
        else:
            settings = {"sink_tokens": SINK_TOKENS, "window_tokens": window}
            options["additional_config"] = {"sink_paged": settings}
        detokenize = Path(model, "tokenizer.json").exists()
        arguments = EngineArgs(
            model,
            skip_tokenizer_init=not detokenize,
            dtype="float32",
            block_size=32,
            max_num_seqs=streams,
            max_num_batched_tokens=CHUNK,
            kv_cache_memory_bytes=1 << 30,
            distributed_executor_backend="mp",
            **options,
        )
        super().__init__(
            LLMEngine.from_engine_args(
                arguments, stat_loggers=[self._statistics], enable_multiprocessing=True
            ),
            detokenize,
        )
        cache = self.engine.vllm_config.cache_config
        self.num_blocks = int(cache.num_gpu_blocks)
        front_end = psutil.Process()
        children = front_end.children(recursive=True)
        self.processes = {"front end": front_end}
        for child in children:
            if (role := role_of(child)) != "other":
                self.processes[role] = child

    def _statistics(self, vllm_config: Any, engine_index: int = 0) -> Statistics:
        self.statistics = Statistics(vllm_config, engine_index)
        return self.statistics

    def memory(self) -> dict[str, int]:
        """Bytes resident, by process."""
        return {role: p.memory_info().rss for role, p in self.processes.items()}

    def blocks(self) -> float:
        """KV blocks held."""
        return self.statistics.usage * (self.num_blocks - 1)

    def close(self) -> None:
        """Stop its processes."""
        self.engine.engine_core.shutdown()
