# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM: full attention, as far as the model's context and the KV pool reach."""

from __future__ import annotations

from streams.engine import Engine, pool_blocks
from streams.report import Report, SkippedError
from streams.result import Result
from streams.workload import Workload
from streams.writing import write_streams


def run(workload: Workload, report: Report) -> Result:
    """Measure one run.

    Raises:
        SkippedError: when the context does not hold a prompt and a token.
    """
    blocks = pool_blocks(workload, workload.text_tokens)
    trained = int(workload.config["max_position_embeddings"])
    context = min(workload.text_tokens, trained, blocks * workload.block_size)
    output_tokens = context - workload.prompt_tokens
    if output_tokens < 2:
        raise SkippedError(
            f"a context of {context} tokens has no room for two tokens after a prompt "
            f"of {workload.prompt_tokens}"
        )
    engine = Engine(workload, blocks, max_model_len=context)
    try:
        return write_streams(engine, workload, report, output_tokens)
    finally:
        engine.close()
