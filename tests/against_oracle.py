# SPDX-License-Identifier: Apache-2.0
"""A model family through the real engine, against the token-by-token oracle."""

from __future__ import annotations

from pathlib import Path

from tests.engines import (
    NEAR_TIE,
    engine,
    generate,
    greedy,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.families import FAMILIES, make_model, text
from tests.oracle import greedy_deficit, stream_losses
from tests.oracle_hf import StreamingModel
from tests.support import record

LOSS_TOLERANCE = 1e-3
STOCK_TOLERANCE = 1e-4
WITHIN = 60
"""Length of a text from which nothing is evicted."""


def check_family(
    family: str,
    folder: Path,
    sinks: tuple[int, int],
    num_tokens: int,
    *,
    keep_native: bool = True,
) -> None:
    """Losses, a greedy continuation, and stock vLLM where nothing is evicted.

    The largest difference of a loss is recorded for the README.

    Args:
        family: of :mod:`tests.families`.
        folder: for its checkpoint.
        sinks: cache config ``(S, R)``.
        num_tokens: length of the greedy continuation, every token of which is judged.
        keep_native: as in ``StreamingModel``.
    """
    make_model(family, folder)

    def oracle() -> StreamingModel:
        return StreamingModel(make_model(family), *sinks, keep_native)

    ids = text(300)
    losses = stream_losses(oracle(), ids)
    with engine(folder, sinks, max_num_batched_tokens=128) as llm:
        short, read, written = generate(
            llm,
            [ids[:WITHIN], ids, ids[:90]],
            [*[greedy(1, prompt_logprobs=0)] * 2, greedy(num_tokens)],
        )
        assert pool_is_empty(llm)
    error = worst(prompt_losses(read), losses)
    assert error < LOSS_TOLERANCE
    tokens = list(written.outputs[0].token_ids)
    assert len(tokens) == num_tokens
    assert greedy_deficit(oracle(), ids[:90], tokens) < NEAR_TIE
    with engine(folder, None) as llm:
        stock = generate(llm, [ids[:WITHIN]], greedy(1, prompt_logprobs=0))[0]
    assert worst(prompt_losses(short), prompt_losses(stock)) < STOCK_TOLERANCE
    record(family, FAMILIES[family].scheme, error)
