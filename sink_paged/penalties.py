# SPDX-License-Identifier: Apache-2.0
"""Presence, frequency and repetition penalties at a cost that does not grow.

vLLM counts a request's whole text anew at each step. Here the counts are kept, and a
step costs the vocabulary. Stands in for ``vllm/v1/sample/ops/penalties.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm._custom_ops import apply_repetition_penalties


def apply_penalties(
    logits: Tensor, metadata: Any, output_token_ids: list[Any]
) -> Tensor:
    """Apply the penalties of a batch to its logits, in place.

    Args:
        logits: ``[num_requests, vocab_size]``.
        metadata: vLLM's ``SamplingMetadata``: the batch's factors, float32
            ``[num_requests]`` each.
        output_token_ids: of each request, with counts (``OutputTokens.counts``) where
            it has penalties.
    """
    if metadata.no_penalties:
        return logits
    counted = [
        (row, counts)
        for row, tokens in enumerate(output_token_ids[: logits.shape[0]])
        if (counts := getattr(tokens, "counts", None)) is not None
    ]
    if not counted:
        return logits
    rows = torch.tensor([row for row, _ in counted], device=logits.device)
    in_prompt = torch.stack([counts.in_prompt for _, counts in counted])
    in_output = torch.stack(
        [torch.from_numpy(counts.in_output) for _, counts in counted]
    )
    in_prompt, in_output = in_prompt.to(logits.device), in_output.to(logits.device)
    came = in_output > 0
    penalised = logits.index_select(0, rows)
    apply_repetition_penalties(
        penalised, in_prompt, came, metadata.repetition_penalties[rows]
    )
    penalised -= metadata.frequency_penalties[rows, None] * in_output
    penalised -= metadata.presence_penalties[rows, None] * came
    return logits.index_copy_(0, rows, penalised)
