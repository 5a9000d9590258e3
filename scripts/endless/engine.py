# SPDX-License-Identifier: Apache-2.0
"""vLLM in three processes, the memory of each in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from load.server import role_of
from overhead.settings import SINK_TOKENS
from streams.engine import Server
from vllm.engine.arg_utils import EngineArgs

CHUNK = 2048
"""Tokens that a step reads."""


class Engine(Server):
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
        arguments = EngineArgs(
            model,
            skip_tokenizer_init=not Path(model, "tokenizer.json").exists(),
            dtype="float32",
            block_size=32,
            max_num_seqs=streams,
            max_num_batched_tokens=CHUNK,
            kv_cache_memory_bytes=1 << 30,
            distributed_executor_backend="mp",
            **options,
        )
        super().__init__(arguments)
        front_end = psutil.Process()
        children = front_end.children(recursive=True)
        self.processes = {"front end": front_end}
        for child in children:
            if (role := role_of(child)) != "other":
                self.processes[role] = child

    def memory(self) -> dict[str, int]:
        """Bytes resident, by process."""
        return {role: p.memory_info().rss for role, p in self.processes.items()}

    def blocks(self) -> float:
        """KV blocks held."""
        return self.statistics.usage * self.num_blocks
