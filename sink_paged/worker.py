# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with streams, chosen by ``parallel_config.worker_cls``.

Each rank of a tensor-parallel group has its own: it reads and proves the rotations of
its shard, and keeps the state of all streams, as vLLM's workers do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)

from sink_paged import probe, runner_v2, streams
from sink_paged.config import StreamConfig
from sink_paged.kv_cache import SinkWindowSpec, StreamBound, group_layers, group_spec
from sink_paged.model_runner import bind_rotations
from sink_paged.rotary import UnsupportedLayerError
from sink_paged.speculation import draft_model, enable_speculation

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as Stock
else:
    Stock = object

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers only


def stream_config(vllm_config: VllmConfig) -> StreamConfig:
    """The resolved settings of a streaming engine."""
    stream = StreamConfig.load(vllm_config.additional_config)
    assert stream is not None, "this worker is chosen by sink eviction only"
    return stream


def resident_config(vllm_config: VllmConfig) -> VllmConfig:
    """``vllm_config`` with ``max_model_len`` as the user gave it.

    The front end and the scheduler see the longest text there; the worker, whose
    models and buffers are sized by it, must see the resident bound.
    """
    resident = copy.copy(vllm_config)
    resident.model_config = copy.copy(vllm_config.model_config)
    resident.model_config.max_model_len = stream_config(vllm_config).resident_tokens
    return resident


def stream_specs(
    stock: Mapping[str, KVCacheSpec], vllm_config: VllmConfig
) -> dict[str, KVCacheSpec]:
    """The layers' caches, each kept by its layer's window.

    Args:
        stock: what vLLM's runner makes of the layers.
        vllm_config: of the worker.

    Raises:
        UnsupportedLayerError: naming a layer whose cache cannot be kept so.
    """
    layers = vllm_config.compilation_config.static_forward_context
    specs: dict[str, SinkWindowSpec] = {}
    for name, spec in stock.items():
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise UnsupportedLayerError(
                f"sink eviction does not support layer {name}: its KV cache is a "
                f"{type(spec).__name__}, not one of keys and values"
            )
        specs[name] = SinkWindowSpec.from_attention(
            spec, layers[name].impl.window, vllm_config.num_lookahead_tokens
        )
    windows = {str(spec.blocks.window): name for name, spec in specs.items()}
    shapes = {(s.num_kv_heads, s.head_size): name for name, s in specs.items()}
    if len(windows) > 1 and len(shapes) > 1:
        raise UnsupportedLayerError(
            "sink eviction does not support layers that differ both in what they keep "
            "and in the heads or the head size of their KV caches, as "
            f"{' and '.join({*windows.values(), *shapes.values()})} do"
        )
    if len(windows) > 1 and (
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    ):
        raise UnsupportedLayerError(
            "sink eviction does not support --disable-hybrid-kv-cache-manager for a "
            "model with sliding-window layers: they keep other tokens than its global "
            f"layers, as {' and '.join(windows.values())} do"
        )
    return dict(specs)


class StreamWorker(Stock):
    """Put before one of vLLM's workers: its streams keep sinks and a window."""

    vllm_config: VllmConfig
    use_v2_model_runner: bool  # the config's property works it out, and logs, each time
    model_runner: Any

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        """See vLLM's ``Worker``."""
        super().__init__(resident_config(vllm_config), *args, **kwargs)

    def init_device(self) -> None:
        """Make the model runner, one whose requests may be streams."""
        super().init_device()
        if self.use_v2_model_runner:
            runner_v2.adopt_runner(self.model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and bind its rotary geometry to the attention layers."""
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        stream = stream_config(self.vllm_config)
        # Layers with LoRA look up each token's adapter; those of the proof have none.
        tokens = np.array([probe.count_tokens(self.vllm_config)])
        with runner.maybe_select_dummy_loras(self.vllm_config.lora_config, tokens):
            bind_rotations(
                runner.get_model(), self.vllm_config, stream, runner.max_num_tokens
            )
        draft = (
            runner_v2.draft_model(runner)
            if self.use_v2_model_runner
            else draft_model(runner)
        )
        if draft is not None:
            bind_rotations(draft.model, draft.vllm_config, stream, draft.max_tokens)
        stock_specs = runner.get_kv_cache_spec
        # The runner asks itself when it measures what CUDA graphs take.
        runner.get_kv_cache_spec = lambda: stream_specs(stock_specs(), self.vllm_config)

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a step, then forget what it has read of its texts."""
        runner = self.model_runner
        if self.use_v2_model_runner:
            return super().execute_model(scheduler_output, *args, **kwargs)
        batch, requests = runner.input_batch, runner.requests
        rows_before = batch.num_reqs
        returning = scheduler_output.scheduled_cached_reqs.all_token_ids
        for request_id, token_ids in returning.items():
            streams.restore_text(requests[request_id], token_ids)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        batch.forget_read(rows_before, scheduler_output.total_num_scheduled_tokens)
        return output

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache; refuses too few in terms of a stream's bound."""
        available: int = super().determine_available_memory()
        groups = group_layers(self.get_kv_cache_spec(), self.vllm_config)
        StreamBound.of(groups, self.vllm_config).check_fits(available, self.vllm_config)
        return available

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache and let streams grow past ``max_model_len``."""
        super().initialize_from_config(kv_cache_config)
        if self.use_v2_model_runner:
            runner_v2.enable_streams(self.model_runner)
        else:
            streams.enable_streams(self.model_runner)
            resident_tokens = stream_config(self.vllm_config).resident_tokens
            enable_speculation(self.model_runner, resident_tokens)
        groups = kv_cache_config.kv_cache_groups
        specs = [group_spec(group) for group in groups]
        bound = StreamBound.of(groups, self.vllm_config)
        pool = kv_cache_config.num_blocks - 1  # one is vLLM's null block
        logger.info(
            "Sink eviction: cache config %s. A stream of any length holds at most %d "
            "KV blocks of %d tokens (%d while it only decodes); the pool has %d, for "
            "%d streams that decode",
            " and ".join(dict.fromkeys(str(spec.blocks.window) for spec in specs)),
            bound.blocks,
            specs[0].block_size,
            bound.decoding_blocks,
            pool,
            pool // bound.decoding_blocks,
        )
