# SPDX-License-Identifier: Apache-2.0
"""The metrics ``vllm:sink_paged_*``, beside vLLM's own wherever those are shown.

Counts are made where blocks are allocated and freed, in the engine core, and travel
with the statistics of a step to the front end, which has the Prometheus registry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from sink_paged.kv_cache import SinkWindowManager

CARRIER = "sink_paged"
"""Key of the counts in ``SchedulerStats.kv_connector_stats``, the one field that takes
anything. Connectors, whose it is, are refused with sink eviction."""


class StreamCounts(NamedTuple):
    """What the metrics show; the field's name is the end of the metric's.

    Attributes:
        blocks_pinned: KV blocks that hold sinks of running streams. One that several
            streams share counts once.
        streams_past_window: running streams that have evicted tokens.
        resident_tokens: tokens that running streams attend, summed over them.
        blocks_evicted: KV blocks freed because they have left a window, since the last
            time.
        tokens_evicted: tokens that have left a cache, since the last time.
    """

    blocks_pinned: int
    streams_past_window: int
    resident_tokens: int
    blocks_evicted: int
    tokens_evicted: int

    @classmethod
    def take(cls, managers: Iterable[SinkWindowManager]) -> StreamCounts:
        """Counts of an engine core; what was evicted is counted anew from here.

        Args:
            managers: of its KV cache groups. Blocks are those of all; tokens and
                streams are counted in the group that keeps most, for layers with a
                sliding window of their own evict as they would without streams.
        """
        managers = list(managers)
        counts = [manager.take_counts() for manager in managers]
        widest = max(
            range(len(managers)), key=lambda i: managers[i].blocks.window.capacity
        )
        return cls(
            blocks_pinned=sum(manager.blocks_pinned for manager in managers),
            streams_past_window=counts[widest].streams_past_window,
            resident_tokens=counts[widest].resident_tokens,
            blocks_evicted=sum(count.blocks_evicted for count in counts),
            tokens_evicted=counts[widest].tokens_evicted,
        )


def add_counts(scheduler: Any, stats: SchedulerStats) -> None:
    """Let the statistics of a step carry the counts of a streaming engine."""
    managers = [
        manager
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
        if isinstance(manager, SinkWindowManager)
    ]
    if managers:
        stats.kv_connector_stats = {CARRIER: list(StreamCounts.take(managers))}


class StreamStatLogger(AggregateStatLoggerBase):
    """Shows the counts of one or more engine cores; put before vLLM's own loggers."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: list[int],
        classes: type[PrometheusStatLogger] = PrometheusStatLogger,
    ) -> None:
        """Register the metrics.

        Args:
            vllm_config: of the front end.
            engine_indexes: of the engine cores behind it.
            classes: vLLM's logger that knows what to make metrics of; Ray's are others.
        """
        labels = ["model_name", "engine"]
        name = vllm_config.model_config.served_model_name

        def per_engine(metric: Any) -> dict[int, Any]:
            return {index: metric.labels(name, str(index)) for index in engine_indexes}

        def gauge(field: str, documentation: str) -> dict[int, Gauge]:
            return per_engine(
                classes._gauge_cls(
                    name=f"vllm:sink_paged_{field}",
                    documentation=documentation,
                    multiprocess_mode="mostrecent",
                    labelnames=labels,
                )
            )

        def counter(field: str, documentation: str) -> dict[int, Counter]:
            return per_engine(
                classes._counter_cls(
                    name=f"vllm:sink_paged_{field}",
                    documentation=documentation,
                    labelnames=labels,
                )
            )

        self.gauges = {
            "blocks_pinned": gauge(
                "blocks_pinned", "KV blocks that hold sinks of running streams."
            ),
            "streams_past_window": gauge(
                "streams_past_window", "Running streams that have evicted tokens."
            ),
            "resident_tokens": gauge(
                "resident_tokens",
                "Tokens that running streams attend, summed over them.",
            ),
        }
        self.counters = {
            "blocks_evicted": counter(
                "blocks_evicted", "KV blocks freed because they have left a window."
            ),
            "tokens_evicted": counter(
                "tokens_evicted", "Tokens that have left the cache of their stream."
            ),
        }

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the counts out of a step's statistics and show them."""
        if scheduler_stats is None:
            return
        carried = scheduler_stats.kv_connector_stats
        if not carried or CARRIER not in carried:
            return
        # The loggers behind this one look here for a connector's.
        scheduler_stats.kv_connector_stats = None
        counts = StreamCounts(*carried[CARRIER])
        for field, gauges in self.gauges.items():
            gauges[engine_idx].set(getattr(counts, field))
        for field, counters in self.counters.items():
            counters[engine_idx].inc(getattr(counts, field))

    def log_engine_initialized(self) -> None:
        """Nothing to say: the worker has."""


def show_counts(vllm_config: VllmConfig, logger_manager: Any) -> None:
    """Register the metrics with a front end's loggers."""
    vllms = next(
        logger
        for logger in logger_manager.stat_loggers
        if isinstance(logger, PrometheusStatLogger)
    )
    logger = StreamStatLogger(vllm_config, logger_manager.engine_indexes, type(vllms))
    logger_manager.stat_loggers.insert(0, logger)
