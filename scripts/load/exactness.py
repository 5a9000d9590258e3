# SPDX-License-Identifier: Apache-2.0
"""Answers given under load, compared token by token with undisturbed ones.

The same prompt is sent again when nothing else runs, with a salt that keeps it off the
prefix cache. Sums in float32 depend on how a batch is composed, so two tokens whose
scores all but tie may change places; from there on the texts differ. At the first token
that differs, the undisturbed run is therefore asked how far apart the two were:

- of a greedy answer, the log-probabilities, after penalties, of the token chosen alone
  and of the one chosen under load;
- of a seeded one, the same after temperature, with the random numbers of that step:
  vLLM's sampler is run again from the request's seed, and the answer under load is a
  near tie if a rise of its token's log-probability by ``NEAR_TIE`` makes the sampler
  choose it.
"""

from __future__ import annotations

import enum
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from load.streaming import Answer

NEAR_TIE = 3e-3
"""Gap of two log-probabilities below which float32 may choose either."""


class Verdict(enum.Enum):
    """What a comparison found."""

    EQUAL = "equal"
    NEAR_TIE = "equal up to a near tie"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Comparison:
    """An answer under load against the undisturbed one.

    Attributes:
        session: number of its session.
        seeded: whether it was sampled.
        prompt_tokens: of its prompt.
        tokens: compared: up to the first difference, that one included.
        verdict: what was found.
        gap: of a greedy answer, of the two tokens at the first difference.
    """

    session: int
    seeded: bool
    prompt_tokens: int
    tokens: int
    verdict: Verdict
    gap: float | None = None


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that is not in both; None if they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def judge(
    under_load: Sequence[int],
    alone: Sequence[int],
    is_near_tie: Callable[[int], bool],
) -> tuple[Verdict, int | None]:
    """The verdict, and where the first difference is.

    Args:
        under_load: tokens of the answer.
        alone: tokens of the undisturbed one.
        is_near_tie: of the index of the first difference.
    """
    index = first_difference(under_load, alone)
    if index is None:
        return Verdict.EQUAL, None
    if len(under_load) != len(alone):
        return Verdict.DIFFERENT, index
    return (Verdict.NEAR_TIE if is_near_tie(index) else Verdict.DIFFERENT), index


def draw(logprobs: Sequence[float], seed: int, step: int) -> int:
    """The token that vLLM's sampler draws at a step of a seeded request.

    Args:
        logprobs: of every token of the vocabulary, temperature applied.
        seed: of the request.
        step: index of the output token.
    """
    current_platform.import_kernels()
    sampler = TopKTopPSampler()
    generators = {0: torch.Generator().manual_seed(seed)}
    row = torch.tensor([logprobs], dtype=torch.float32)
    for _ in range(step):
        sampler(row.clone(), generators, None, None)
    return int(sampler(row.clone(), generators, None, None)[0])


def seeded_near_tie(
    logprobs: Sequence[float], seed: int, step: int, alone: int, under_load: int
) -> bool:
    """Whether the two tokens' scores in the draw of a step are within ``NEAR_TIE``.

    Raises:
        RuntimeError: the draw is not the undisturbed run's: nothing can be said.
    """
    if draw(logprobs, seed, step) != alone:
        raise RuntimeError(
            f"seed {seed}, step {step}: the sampler draws another token than the "
            "undisturbed run wrote"
        )
    raised = list(logprobs)
    raised[under_load] += NEAR_TIE
    return draw(raised, seed, step) == under_load


class Undisturbed:
    """Sends requests one at a time to a server that does nothing else."""

    def __init__(self, url: str, model: str) -> None:
        """``url`` is the server's base URL."""
        self._http = httpx.Client(base_url=url, timeout=600)
        self._model = model
        self._salts = 0

    def run(self, answer: Answer, max_tokens: int, logprobs: int | None) -> Any:
        """The choice that a request like ``answer``'s gets."""
        self._salts += 1
        body = answer.params | {
            "model": self._model,
            "prompt": answer.prompt,
            "max_tokens": max_tokens,
            "cache_salt": f"undisturbed {self._salts}",
            "logprobs": logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        response = self._http.post("/v1/completions", json=body).raise_for_status()
        return response.json()["choices"][0]

    def compare(self, answer: Answer) -> Comparison:
        """Judge one answer."""
        seed = answer.params.get("seed")
        choice = self.run(answer, len(answer.tokens), logprobs=None)
        alone = choice["token_ids"]
        verdict, index = judge(
            answer.tokens,
            alone,
            functools.partial(self._is_near_tie, answer, alone),
        )
        gap = None
        if index is not None and seed is None and index < len(alone):
            gap = self._gap(answer, alone, index)
        return Comparison(
            answer.session,
            seed is not None,
            len(answer.prompt),
            len(alone) if index is None else index + 1,
            verdict,
            gap,
        )

    def _is_near_tie(self, answer: Answer, alone: list[int], index: int) -> bool:
        if "seed" not in answer.params:
            return self._gap(answer, alone, index) < NEAR_TIE
        logprobs = self._logprobs(answer, alone, index)
        pair = alone[index], answer.tokens[index]
        return seeded_near_tie(logprobs, answer.params["seed"], index, *pair)

    def _gap(self, answer: Answer, alone: list[int], index: int) -> float:
        logprobs = self._logprobs(answer, alone, index)
        return logprobs[alone[index]] - logprobs[answer.tokens[index]]

    def _logprobs(self, answer: Answer, alone: list[int], index: int) -> list[float]:
        """Of every token of the vocabulary at a step of the undisturbed run."""
        choice = self.run(answer, index + 1, logprobs=-1)
        if choice["token_ids"] != alone[: index + 1]:
            raise RuntimeError(f"session {answer.session}: two undisturbed runs differ")
        return by_token(choice["logprobs"]["top_logprobs"][-1])


def by_token(entries: dict[str, float]) -> list[float]:
    """Log-probabilities in the order of the vocabulary, from keys ``token_id:ID``."""
    values = {int(name.removeprefix("token_id:")): x for name, x in entries.items()}
    return [values[token] for token in range(len(values))]


def spot_checks(
    undisturbed: Undisturbed, answers: Sequence[Answer], count: int, seed: int
) -> Iterator[Comparison]:
    """Compare a random sample of answers."""
    sample = random.Random(seed).sample(range(len(answers)), min(count, len(answers)))
    for index in sample:
        yield undisturbed.compare(answers[index])
