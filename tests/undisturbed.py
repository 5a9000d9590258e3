# SPDX-License-Identifier: Apache-2.0
"""A text, and what a stream that nothing disturbs reads and writes of it."""

from __future__ import annotations

import dataclasses

from vllm import LLM

from tests.engines import continuations, generate, greedy, prompt_losses

SINKS = (4, 60)
TOLERANCE = 1e-4
READ = greedy(1, prompt_logprobs=0)


def text(length: int, seed: int) -> list[int]:
    return [256, *((7919 * i * i + 31 * seed * i) % 256 for i in range(1, length))]


TEXT = text(700, seed=0)


@dataclasses.dataclass
class Undisturbed:
    """One stream alone, in one chunk, with a cold cache."""

    losses: list[float]
    tokens: list[int]

    @classmethod
    def of(cls, llm: LLM) -> Undisturbed:
        read = generate(llm, [TEXT], READ)[0]
        return cls(prompt_losses(read), continuations(llm, [TEXT])[0])
