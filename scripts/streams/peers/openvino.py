# SPDX-License-Identifier: Apache-2.0
"""OpenVINO GenAI's continuous batching, with and without its cache eviction.

Its eviction keeps the first tokens, the recent ones, and between them the tokens with
the highest attention scores, all in blocks of 32; that area is given one block, the
least it takes. Weights and activations are of the workload's dtype, and the KV cache
unless its ``kv_cache_dtype`` is fp8, for which it is u8; OpenVINO itself would take
bfloat16 on processors with AMX and u8 always. Prefix caching is off. The KV pool is
that of full attention with eviction too: with one that just holds what is kept, release
2026.4.1 corrupts its heap.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from streams.memory import peak_bytes, reset_peaks
from streams.report import Report, SkippedError
from streams.result import Recorder, Result
from streams.workload import Workload

BLOCK = 32
"""Tokens in a KV block of OpenVINO's CPU device."""
WARM_UP_TOKENS = 16
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def run(workload: Workload, report: Report, evict: bool = True) -> Result:
    """Measure one run.

    Raises:
        SkippedError: when this Python has no OpenVINO GenAI.
    """
    begun = time.perf_counter()
    try:
        pipeline = _start(workload, report, evict)
    except ModuleNotFoundError as error:
        reason = f"its Python has no module {error.name}"
        raise SkippedError(reason, everywhere=True) from error
    startup = time.perf_counter() - begun
    report.phase("warming up")
    prompts = workload.prompts("warm-up")
    short = [p[: None if i == 0 else WARM_UP_TOKENS] for i, p in enumerate(prompts)]
    _write(pipeline, short, WARM_UP_TOKENS, None)
    reset_peaks()

    report.phase("writing", workload.streams * workload.output_tokens)
    recorder = Recorder(workload.streams, workload.prompt_tokens, report.tokens)
    usage = _write(pipeline, workload.prompts(), workload.output_tokens, recorder)
    blocks = _pool_blocks(workload)
    return recorder.result(
        workload.output_tokens,
        kv_blocks_peak=round(usage / 100 * blocks),
        kv_blocks=blocks,
        kv_block_size=BLOCK,
        peak_rss_bytes=peak_bytes(),
        startup_seconds=startup,
        openvino_precisions=_precisions(workload),
        openvino_genai_version=importlib.metadata.version("openvino-genai"),
    )


def _start(workload: Workload, report: Report, evict: bool) -> Any:
    import openvino_genai  # type: ignore[import-not-found]

    folder = Path(workload.scratch, "openvino")
    if not folder.exists():
        report.phase("exporting")
        # Elsewhere, so that this process does not keep what the export leaves.
        command = [sys.executable, "-m", __name__, workload.model, str(folder)]
        subprocess.run(command, check=True)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = workload.streams
    scheduler.max_num_batched_tokens = workload.max_num_batched_tokens
    scheduler.num_kv_blocks = _pool_blocks(workload)
    scheduler.enable_prefix_caching = False
    if evict:
        start, most = (
            -(-tokens // BLOCK) * BLOCK
            for tokens in (max(1, workload.sink_tokens), workload.window)
        )
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = openvino_genai.CacheEvictionConfig(
            start_size=start,
            recent_size=most - start - BLOCK,
            max_cache_size=most,
            aggregation_mode=openvino_genai.AggregationMode.SUM,
            apply_rotation=True,
        )
    return openvino_genai.ContinuousBatchingPipeline(
        folder, scheduler, "CPU", _precisions(workload)
    )


def _precisions(workload: Workload) -> dict[str, str]:
    precision = PRECISIONS[workload.dtype]
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision if workload.kv_cache_dtype == "auto" else "u8",
    }


def _pool_blocks(workload: Workload) -> int:
    if workload.pool_tokens:
        return workload.pool_tokens // BLOCK
    return workload.streams * -(-(workload.text_tokens + BLOCK) // BLOCK)


def _write(
    pipeline: Any, prompts: list[list[int]], tokens: int, recorder: Recorder | None
) -> float:
    """Let streams write; the most of the pool in use, in percent."""
    import openvino  # type: ignore[import-not-found]
    import openvino_genai

    generation = openvino_genai.GenerationConfig()
    generation.max_new_tokens = tokens
    generation.ignore_eos = True
    generation.do_sample = False
    handles = [
        pipeline.add_request(i, openvino.Tensor(np.array([p], np.int64)), generation)
        for i, p in enumerate(prompts)
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        moment = time.perf_counter()
        for stream, handle in enumerate(handles):
            if recorder and handle.can_read():
                for output in handle.read().values():
                    recorder.wrote(stream, len(output.generated_ids), moment)
    return float(pipeline.get_metrics().max_cache_usage)


def export(model: str, folder: str) -> None:
    """Convert a checkpoint to OpenVINO's format, weights as they are."""
    from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found]

    converted = OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, load_in_8bit=False
    )
    converted.save_pretrained(folder)


if __name__ == "__main__":
    export(*sys.argv[1:])
