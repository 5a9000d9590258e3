# SPDX-License-Identifier: Apache-2.0
"""N-grams looked up on the device in what a stream keeps resident.

vLLM looks through a row from its beginning, where a text begins there. Rows of streams
slide: one holds a few tokens more than it may be searched for, and those are blanked.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

from sink_paged.runner_v2.requests import StreamRequestState

NO_TOKEN = -1
"""Stands where a token has been blanked; equal to none."""


class StreamNgramSpeculator(NgramGPUSpeculator):
    """Looks the last tokens up in the tails of the rows.

    Attributes:
        req_states: see ``StreamRequestState``.
    """

    req_states: StreamRequestState

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, streams: StreamRequestState
    ) -> None:
        """See ``NgramGPUSpeculator``, which is told how long a row is."""
        rows = copy.copy(vllm_config)
        rows.model_config = copy.copy(vllm_config.model_config)
        rows.model_config.max_model_len = streams.all_token_ids.gpu.shape[1]
        super().__init__(rows, device, streams)

    def propose(
        self, input_batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any
    ) -> Tensor:
        """See ``NgramGPUSpeculator``: int64 ``[num_reqs, num_speculative_tokens]``."""
        streams = self.req_states
        if not dummy_run:
            blank_kernel[(input_batch.num_reqs,)](
                streams.all_token_ids.gpu,
                streams.all_token_ids.gpu.stride(0),
                input_batch.idx_mapping,
                streams.total_len.gpu,
                streams.tail,
                1 + self.num_speculative_steps,
                BLANK=NO_TOKEN,
            )
        return super().propose(input_batch, *args, dummy_run=dummy_run, **kwargs)


@triton.jit
def blank_kernel(  # type: ignore[no-untyped-def]
    rows,
    row_stride,
    idx_mapping,
    total_len,
    tail,
    num_written,
    BLANK: tl.constexpr,  # noqa: N803
):
    """Blank what a step of ``num_written`` tokens at most has put out of a tail."""
    row = tl.load(idx_mapping + tl.program_id(0)).to(tl.int64)
    end = tl.load(total_len + row) - tail
    for token in range(tl.maximum(end - num_written, 0), end):
        tl.store(rows + row * row_stride + token, BLANK)
