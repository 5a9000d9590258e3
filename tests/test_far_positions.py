# SPDX-License-Identifier: Apache-2.0
"""A text whose attended tokens repeat has the same losses wherever it stands."""

import pytest

from tests.engines import GOLDEN, engine, generate, greedy, worst

SINKS = (4, 60)
PERIOD = 50
NEAR = 1_000
FAR = 1_000_000


def periodic(length: int) -> list[int]:
    """Sinks, then a period again and again; same phase at every multiple of it."""
    period = [(17 * i * i + 5) % 251 for i in range(PERIOD)]
    return [256, 1, 2, 3, *period * (length // PERIOD)]


@pytest.mark.slow
def test_a_million_tokens_on() -> None:
    """Read in chunks, then written: 60 tokens with their log-probabilities."""
    written = []
    with engine(GOLDEN, SINKS, max_num_batched_tokens=8192) as llm:
        for length in (NEAR, FAR):
            output = generate(llm, [periodic(length)], greedy(60, logprobs=0))[0]
            completion = output.outputs[0]
            assert completion.logprobs is not None
            tokens = list(completion.token_ids)
            losses = [
                -entry[token].logprob
                for token, entry in zip(tokens, completion.logprobs, strict=True)
            ]
            written.append((tokens, losses))
    (near_tokens, near_losses), (far_tokens, far_losses) = written
    assert near_tokens == far_tokens
    assert worst(near_losses, far_losses) < 1e-3
