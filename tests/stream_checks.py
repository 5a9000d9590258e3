# SPDX-License-Identifier: Apache-2.0
"""A checkpoint through the real engine, against a token-by-token oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.engines import (
    NEAR_TIE,
    engine,
    generate,
    greedy,
    kv_cache_manager,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.families import MIXED, make_model, text
from tests.oracle import greedy_deficit, stream_losses
from tests.oracle_hf import StreamingModel

SINKS = (4, 60)
TRAINED = 256
IDS = [256, *(7919 * i * i % 251 for i in range(1, 400))]
WITHIN = 60
"""Length of a text from which nothing is evicted."""
SHORT = IDS[:WITHIN]
LOSS_TOLERANCE = 1e-3
STOCK_TOLERANCE = 1e-4


class Checked(NamedTuple):
    """What ``check_stream`` saw.

    Attributes:
        short: the engine's losses of the text's first ``WITHIN`` tokens, for which
            nothing is evicted.
        error: largest difference of a loss of the text from the oracle.
    """

    short: list[float]
    error: float


def check_groups(
    num_tokens: int = 300, num_written: int = 100, **options: Any
) -> float:
    """A model of three KV-cache groups, whose layers keep different tokens.

    Args:
        num_tokens: of the text.
        num_written: greedy tokens behind the text's first 50.
        options: of the engine.

    Returns:
        The largest difference of a loss from the oracle.
    """
    ids = text(num_tokens)
    with TemporaryDirectory() as name:
        model = make_model(MIXED, Path(name))
        options = {"block_size": 16, "max_num_batched_tokens": 96, **options}
        with engine(Path(name), SINKS, **options) as llm:
            groups = kv_cache_manager(llm).kv_cache_config.kv_cache_groups
            assert len(groups) == 3
            read, beside, written = generate(
                llm,
                [ids, ids[:41], ids[:50]],
                [*[greedy(1, prompt_logprobs=0)] * 2, greedy(num_written)],
            )
            assert pool_is_empty(llm)
    losses = stream_losses(StreamingModel(model, *SINKS), ids)
    error = worst(
        prompt_losses(read) + prompt_losses(beside), losses + losses[: 41 - 1]
    )
    assert error < LOSS_TOLERANCE
    tokens = list(written.outputs[0].token_ids)
    assert len(tokens) == num_written
    assert greedy_deficit(StreamingModel(model, *SINKS), ids[:50], tokens) < NEAR_TIE
    return error


def check_stream(
    folder: Path,
    oracle: Callable[[], Any],
    sinks: tuple[int, int] = SINKS,
    ids: list[int] = IDS,
    num_written: int = 400,
    prompt_tokens: int = 50,
) -> Checked:
    """Losses of a text, read in chunks, and greedy tokens, each judged by the oracle.

    Args:
        folder: of the checkpoint.
        oracle: makes a fresh stream of it, with cache config ``sinks``.
        sinks: ``(S, R)``.
        ids: the text.
        num_written: greedy tokens.
        prompt_tokens: tokens of the text before them.
    """
    losses = stream_losses(oracle(), ids)
    prompt = ids[:prompt_tokens]
    with engine(folder, sinks, max_num_batched_tokens=128) as llm:
        short, read, written = generate(
            llm,
            [ids[:WITHIN], ids, prompt],
            [*[greedy(1, prompt_logprobs=0)] * 2, greedy(num_written)],
        )
        assert pool_is_empty(llm)
    error = worst(prompt_losses(read), losses)
    assert error < LOSS_TOLERANCE
    tokens = list(written.outputs[0].token_ids)
    assert len(tokens) == num_written
    assert greedy_deficit(oracle(), prompt, tokens) < NEAR_TIE
    return Checked(prompt_losses(short), error)


def stock_losses(folder: Path, ids: list[int] = IDS) -> list[float]:
    """Losses of the text's first tokens on vLLM without sink eviction."""
    with engine(folder, None) as llm:
        params = greedy(1, prompt_logprobs=0)
        return prompt_losses(generate(llm, [ids[:WITHIN]], params)[0])


@torch.no_grad()
def dense_losses(model: nn.Module, ids: list[int]) -> list[float]:
    """Losses of a Hugging Face model's own forward pass over the whole text."""
    scores: Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(scores[t, ids[t + 1]]) for t in range(len(ids) - 1)]
