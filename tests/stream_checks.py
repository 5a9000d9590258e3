# SPDX-License-Identifier: Apache-2.0
"""A checkpoint through the real engine, against a token-by-token oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.engines import (
    NEAR_TIE,
    engine,
    generate,
    greedy,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.oracle import greedy_deficit, stream_losses

SINKS = (4, 60)
TRAINED = 256
IDS = [256, *(7919 * i * i % 251 for i in range(1, 400))]
SHORT = IDS[:60]  # within the window
PROMPT = IDS[:50]
WRITTEN = 400
LOSS_TOLERANCE = 1e-3


class Checked(NamedTuple):
    """What ``check_stream`` saw.

    Attributes:
        short: the engine's losses of ``SHORT``, for which nothing is evicted.
        error: largest difference of a loss of ``IDS`` from the oracle.
    """

    short: list[float]
    error: float


def check_stream(folder: Path, oracle: Callable[[], Any]) -> Checked:
    """Losses of a long text, read in chunks, and of 400 greedy tokens.

    Args:
        folder: of the checkpoint.
        oracle: makes a fresh stream of it, with cache config ``SINKS``.
    """
    losses = stream_losses(oracle(), IDS)
    with engine(folder, SINKS, max_num_batched_tokens=128) as llm:
        read, short, written = generate(
            llm,
            [IDS, SHORT, PROMPT],
            [*[greedy(1, prompt_logprobs=0)] * 2, greedy(WRITTEN)],
        )
        assert pool_is_empty(llm)
    error = worst(prompt_losses(read), losses)
    assert error < LOSS_TOLERANCE
    tokens = list(written.outputs[0].token_ids)
    assert len(tokens) == WRITTEN
    assert greedy_deficit(oracle(), PROMPT, tokens) < NEAR_TIE
    return Checked(prompt_losses(short), error)


def stock_losses(folder: Path) -> list[float]:
    """Losses of ``SHORT`` on vLLM without sink eviction."""
    with engine(folder, None) as llm:
        return prompt_losses(generate(llm, [SHORT], greedy(1, prompt_logprobs=0))[0])


@torch.no_grad()
def dense_losses(model: nn.Module, ids: list[int]) -> list[float]:
    """Losses of a Hugging Face model's own forward pass over the whole text."""
    scores: Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(scores[t, ids[t + 1]]) for t in range(len(ids) - 1)]
