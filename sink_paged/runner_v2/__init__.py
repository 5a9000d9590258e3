# SPDX-License-Identifier: Apache-2.0
"""Streams in vLLM's model runner V2 (``vllm/v1/worker/gpu/``), the default on CUDA.

Its state lives on the device, in rows that are as long as the longest text. Here:

- ``block_tables``: rings of columns;
- ``requests``: what has still to be read of a text, and the last of what was written;
- ``sampling``: penalties and prompt log-probabilities from those;
- ``speculation``, ``ngram``: drafters on texts without an end;
- ``runner``: where the runner meets them.

vLLM's modules are imported only when such a runner is there: they need Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sink_paged.speculation import DraftModel


def adopt_runner(runner: Any) -> None:
    """Turn a runner that has no model yet into a runner of streams, in place."""
    from sink_paged.runner_v2.runner import StreamRunner

    StreamRunner.adopt(runner)


def draft_model(runner: Any) -> DraftModel | None:
    """The draft model of a loaded ``runner``, if it has one."""
    from sink_paged.runner_v2.speculation import draft_model

    return draft_model(runner)


def enable_streams(runner: Any) -> None:
    """Let the requests of ``runner`` grow past ``max_model_len``.

    Called once its KV cache is initialised.
    """
    from sink_paged.runner_v2.runner import enable_streams

    enable_streams(runner)
