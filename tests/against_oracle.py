# SPDX-License-Identifier: Apache-2.0
"""A model family through the real engine, against the token-by-token oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engines import (
    NEAR_TIE,
    engine,
    generate,
    greedy,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.families import make_model, text
from tests.oracle import greedy_deficit, stream_losses
from tests.oracle_hf import StreamingModel

LOSS_TOLERANCE = 1e-3
STOCK_TOLERANCE = 1e-4


def check_family(
    family: str,
    folder: Path,
    sinks: tuple[int, int],
    num_tokens: int,
    *,
    stock_tokens: int = 60,
    keep_native: bool = True,
    **options: Any,
) -> float:
    """Losses, a greedy continuation, and stock vLLM where nothing is evicted.

    Args:
        family: of :mod:`tests.families`.
        folder: for its checkpoint.
        sinks: cache config ``(S, R)``.
        num_tokens: length of the greedy continuation, every token of which is judged.
        stock_tokens: length of the text on which stock vLLM must agree.
        keep_native: as in ``StreamingModel``.
        options: of the engine.

    Returns:
        The largest difference between the losses of a text of 300 tokens.
    """
    make_model(family, folder)

    def oracle() -> StreamingModel:
        return StreamingModel(make_model(family), *sinks, keep_native)

    ids = text(300)
    losses = stream_losses(oracle(), ids)
    with engine(folder, sinks, max_num_batched_tokens=128, **options) as llm:
        short, read, written = generate(
            llm,
            [ids[:stock_tokens], ids, ids[:90]],
            [*[greedy(1, prompt_logprobs=0)] * 2, greedy(num_tokens)],
        )
        assert pool_is_empty(llm)
    error = worst(prompt_losses(read), losses)
    assert error < LOSS_TOLERANCE
    tokens = list(written.outputs[0].token_ids)
    assert len(tokens) == num_tokens
    assert greedy_deficit(oracle(), ids[:90], tokens) < NEAR_TIE
    with engine(folder, None, **options) as llm:
        stock = generate(llm, [ids[:stock_tokens]], greedy(1, prompt_logprobs=0))[0]
    assert worst(prompt_losses(short), prompt_losses(stock)) < STOCK_TOLERANCE
    return error
