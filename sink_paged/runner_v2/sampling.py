# SPDX-License-Identifier: Apache-2.0
"""What model runner V2 samples by: penalties, bad words, prompt log-probabilities.

In vLLM they go through ``all_token_ids``, whose rows hold a stream's last tokens only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from sink_paged.runner_v2.requests import StreamRequestState, to_device


class StreamPenalties(PenaltiesState):
    """Penalties whose counts begin with those of the text, made on the host.

    vLLM's kernel then counts each sampled token as it comes, at no cost that grows.
    """

    streams: StreamRequestState

    def apply_staged_writes(self) -> None:
        """Count the texts of the requests that have been added.

        Since vLLM 0.33 some have none, while it measures memory on a GPU.
        """
        for row in self._new_penalties_reqs:
            text = np.asarray(self.streams.texts.get(row, ()), dtype=np.int64)
            prompt, output = np.split(text, [self.streams.prompt_len.np[row]])
            mask = np.zeros(32 * self.prompt_bin_mask.shape[1], dtype=np.bool_)
            mask[prompt] = True
            bits = np.packbits(mask, bitorder="little").view(np.int32)
            counts = np.bincount(output, minlength=self.output_bin_counts.shape[1])
            self.prompt_bin_mask[row] = to_device(bits, self.device)
            self.output_bin_counts[row] = to_device(
                counts.astype(np.int32), self.device
            )
        self._new_penalties_reqs.clear()
        super().apply_staged_writes()


class StreamPromptLogprobs(PromptLogprobsWorker):
    """Prompt log-probabilities of the tokens that the host has at hand."""

    streams: StreamRequestState

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: Any,
    ) -> Any:
        """See ``PromptLogprobsWorker``, which reads the token behind each position.

        The step's tokens stand in one row here, that of every request, and a request's
        first token is where it stands in the step.
        """
        targets = self.streams.targets
        if targets is not None:
            num_computed_tokens = num_computed_tokens.clone()
            starts = input_batch.query_start_loc[: input_batch.num_reqs]
            num_computed_tokens[input_batch.idx_mapping.long()] = starts - 1
            all_token_ids = targets.expand(self.max_num_reqs, -1)
        return super().compute_prompt_logprobs(
            logits_fn,
            hidden_states,
            input_batch,
            all_token_ids,
            num_computed_tokens,
            prompt_lens,
        )


def adopt_sampler(runner: Any, streams: StreamRequestState) -> None:
    """Give the sampler of a loaded runner what it may read of streams.

    Raises:
        ValueError: something in it may look back at any token of a text.
    """
    sampler = runner.sampler
    processors = getattr(sampler, "logits_processors", [])
    known = (LogitBiasState, PenaltiesState, BadWordsState)
    for processor in processors:
        if not isinstance(processor, known):
            raise ValueError(
                "sink eviction does not support custom logits processors on model "
                f"runner V2, as {type(processor).__name__} is: they may look back at "
                "any token of a text; VLLM_USE_V2_MODEL_RUNNER=0 takes them"
            )
    penalties = sampler.penalties_state
    penalties.__class__ = StreamPenalties
    penalties.streams = streams
    rows = SimpleNamespace(
        all_token_ids=streams.all_token_ids,
        prompt_len=streams.row_prompt_len,
        total_len=streams.total_len,
    )
    for state in (*processors, *vars(sampler).values()):
        if isinstance(state, BadWordsState):
            state.req_states = rows
    runner.prompt_logprobs_worker.__class__ = StreamPromptLogprobs
    runner.prompt_logprobs_worker.streams = streams
