# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine as a server runs it, stepped from this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

from streams.memory import peak_bytes, reset_peaks
from streams.workload import Workload

WARM_UP_TOKENS = 16
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


class Delta(NamedTuple):
    """What a step brought to a request.

    Attributes:
        name: of the request.
        tokens: the new ones.
        finished: whether they are the last.
        moment: when the step ended, seconds of ``time.perf_counter``.
    """

    name: str
    tokens: list[int]
    finished: bool
    moment: float


class Statistics(StatLoggerBase):  # type: ignore[misc,unused-ignore]
    """What the scheduler says after each step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """See ``StatLoggerBase``."""
        self.preemptions = 0
        self.usage = self.peak_usage = 0.0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take over a step's figures."""
        if scheduler_stats is not None:
            self.usage = float(scheduler_stats.kv_cache_usage)
            self.peak_usage = max(self.peak_usage, self.usage)
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Requests:
    """Greedy requests of token ids to an engine, and the tokens they bring."""

    def __init__(self, engine: LLMEngine) -> None:
        """Take over a started engine."""
        self.engine = engine

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        """Add a greedy request that has no end but its length."""
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=not self.engine.model_config.skip_tokenizer_init,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> Iterator[Delta]:
        """Wait for the engine core's next message."""
        outputs = self.engine.step()
        moment = time.perf_counter()
        for output in outputs:
            tokens = list(output.outputs[0].token_ids)
            yield Delta(output.request_id, tokens, output.finished, moment)

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self.engine.has_unfinished_requests())


class Server(Requests):
    """vLLM with its front end here and its engine core in a process of its own.

    Attributes:
        statistics: what the scheduler says.
        num_blocks: KV blocks, vLLM's null block not counted.
    """

    def __init__(self, arguments: EngineArgs) -> None:
        """Start it, which takes tens of seconds."""
        super().__init__(
            LLMEngine.from_engine_args(
                arguments, stat_loggers=[self._statistics], enable_multiprocessing=True
            )
        )
        blocks = self.engine.vllm_config.cache_config.num_gpu_blocks
        assert blocks is not None
        self.num_blocks = int(blocks) - 1

    def _statistics(self, vllm_config: Any, engine_index: int = 0) -> Statistics:
        self.statistics = Statistics(vllm_config, engine_index)
        return self.statistics

    def close(self) -> None:
        """Stop its processes."""
        self.engine.engine_core.shutdown()


class Engine(Server):
    """A server of streams of a workload, in a KV pool of so many blocks.

    Args:
        workload: settings that all peers share.
        pool_blocks: KV blocks, vLLM's null block not counted.
        options: further arguments of ``EngineArgs``.
    """

    def __init__(self, workload: Workload, pool_blocks: int, **options: Any) -> None:
        """Start the engine, which takes tens of seconds."""
        begun = time.perf_counter()
        self.workload = workload
        if current_platform.is_cpu():
            # The worker in the engine core's process, where vLLM's default keeps one of
            # few cores free of it.
            options["distributed_executor_backend"] = IN_PROCESS
        else:
            # The pool's size is given: this only asks for free memory at the start.
            options["gpu_memory_utilization"] = 0.1
        page = workload.block_size * workload.kv_bytes_per_token
        arguments = EngineArgs(
            workload.model,
            skip_tokenizer_init=True,
            dtype=workload.dtype,
            kv_cache_dtype=workload.kv_cache_dtype,
            enforce_eager=workload.eager,
            block_size=workload.block_size,
            max_num_seqs=workload.streams,
            max_num_batched_tokens=workload.max_num_batched_tokens,
            kv_cache_memory_bytes=(pool_blocks + 1) * page,
            **options,
        )
        super().__init__(arguments)
        self.start_seconds = time.perf_counter() - begun

    def warm_up(self) -> None:
        """Run what is to be timed once: a whole prompt, and a step of all streams."""
        prompts = self.workload.prompts("warm-up")
        for index, prompt in enumerate(prompts):
            short = prompt[:WARM_UP_TOKENS] if index else prompt
            self.add(f"warm-up {index}", short, WARM_UP_TOKENS)
        while self.busy:
            list(self.step())
        self.engine.reset_prefix_cache()
        self.statistics.preemptions, self.statistics.peak_usage = 0, 0.0
        reset_peaks()

    def figures(self) -> dict[str, Any]:
        """What the scheduler and the kernel counted since the warm-up."""
        return {
            "num_preemptions": self.statistics.preemptions,
            "kv_blocks_peak": round(self.statistics.peak_usage * self.num_blocks),
            "kv_blocks": self.num_blocks,
            "kv_block_size": self.workload.block_size,
            "peak_rss_bytes": peak_bytes(),
            "startup_seconds": self.start_seconds,
        }


def pool_blocks(workload: Workload, tokens_a_stream: int, shared: int = 0) -> int:
    """KV blocks: the pool asked for, less the null block, or what the streams need.

    Args:
        workload: its ``pool_tokens`` is the pool asked for.
        tokens_a_stream: most tokens a stream keeps, every part of it in blocks.
        shared: blocks needed once.
    """
    size = workload.block_size
    if workload.pool_tokens:
        return workload.pool_tokens // size - 1
    return workload.streams * blocks_for(tokens_a_stream, size) + shared


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)
