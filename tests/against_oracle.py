# SPDX-License-Identifier: Apache-2.0
"""A model family through the real engine, against the token-by-token oracle."""

from __future__ import annotations

from pathlib import Path

from tests.engines import worst
from tests.families import FAMILIES, make_model, text
from tests.oracle_hf import StreamingModel
from tests.stream_checks import STOCK_TOLERANCE, check_stream, stock_losses
from tests.support import record


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
    checked = check_stream(folder, oracle, sinks, ids, num_tokens, prompt_tokens=90)
    assert worst(checked.short, stock_losses(folder, ids)) < STOCK_TOLERANCE
    record(family, FAMILIES[family].scheme, checked.error)
