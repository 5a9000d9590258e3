# SPDX-License-Identifier: Apache-2.0
"""vLLM with sink eviction: each stream keeps the sinks and the window."""

from __future__ import annotations

from streams.engine import Engine, blocks_for, pool_blocks
from streams.report import Report
from streams.result import Result
from streams.workload import Workload
from streams.writing import write_streams


def run(workload: Workload, report: Report) -> Result:
    """Measure one run."""
    size = workload.block_size
    recent = workload.window - workload.sink_tokens
    blocks = blocks_for(workload.sink_tokens, size) + blocks_for(recent, size) + 2
    in_flight = workload.steps_in_flight * workload.max_num_batched_tokens
    chunks = blocks_for(in_flight, size)
    settings = {"sink_tokens": workload.sink_tokens, "window_tokens": recent}
    engine = Engine(
        workload,
        pool_blocks(workload, blocks * size, shared=chunks),
        max_model_len=workload.window + 1,
        additional_config={"sink_paged": settings},
    )
    try:
        return write_streams(engine, workload, report, workload.output_tokens)
    finally:
        engine.close()
