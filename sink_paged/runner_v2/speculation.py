# SPDX-License-Identifier: Apache-2.0
"""Drafters of model runner V2 on texts without an end.

A draft model finds the slots of its tokens through the runner's block tables, which are
rings, and samples by states that are bounded already; what is left of vLLM's limit is
that it clamps positions to ``max_model_len``. A drafter by n-grams reads rows of token
ids, see :mod:`sink_paged.runner_v2.ngram`.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.runner_v2.requests import StreamRequestState
from sink_paged.speculation import DraftModel


def tokens_looked_back(vllm_config: VllmConfig) -> int:
    """Last tokens of a text that the drafter reads: what a stream keeps resident.

    Args:
        vllm_config: of the worker, whose ``max_model_len`` is that bound.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in ("ngram", "ngram_gpu"):
        return 0
    return int(vllm_config.model_config.max_model_len)


def adopt_speculator(runner: Any, streams: StreamRequestState) -> None:
    """Let the drafter of ``runner``, if it has one, work on streams.

    Args:
        runner: one that has no model yet.
        streams: its request states.
    """
    speculator = runner.speculator
    if speculator is None:
        return
    if isinstance(speculator, DraftModelSpeculator):
        # Since vLLM 0.33 a property, that of the config; an attribute before.
        kind = type(speculator)
        unbounded = {"max_model_len": MAX_STREAM_TOKENS}
        speculator.__class__ = type(f"Stream{kind.__name__}", (kind,), unbounded)
        vars(speculator).pop("max_model_len", None)
        speculator.draft_max_seq_len = MAX_STREAM_TOKENS
        return
    from sink_paged.runner_v2.ngram import StreamNgramSpeculator

    runner.speculator = StreamNgramSpeculator(
        runner.vllm_config, runner.device, streams
    )


def draft_model(runner: Any) -> DraftModel | None:
    """The draft model of a loaded ``runner``, if it has one."""
    speculator = runner.speculator
    if not isinstance(speculator, DraftModelSpeculator):
        return None
    vllm_config = copy.copy(runner.vllm_config)
    vllm_config.model_config = speculator.draft_model_config
    # Behind the tokens of a request it reads the one that has just been sampled.
    max_tokens = runner.max_num_tokens + runner.max_num_reqs
    return DraftModel(speculator.model, vllm_config, max_tokens)
