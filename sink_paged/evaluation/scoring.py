# SPDX-License-Identifier: Apache-2.0
"""Losses of a text's tokens, by an engine of a cache config.

Prefill is exact for streams, so a text is read in chunks, not token by token: what the
loss of a token is does not depend on how many are read at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from sink_paged.evaluation.configs import CacheConfig

if TYPE_CHECKING:
    from vllm import LLM

Losses = npt.NDArray[np.float64]
CHUNK = 2048
"""Tokens that vLLM prefills in one step."""


class Scores(NamedTuple):
    """What a model says of a text's tokens, all but the first.

    Attributes:
        losses: in nats, ``[len(tokens) - 1]``.
        ranks: ``int64 [len(tokens) - 1]``: how many tokens of the vocabulary are at
            least as likely, itself included. Greedy decoding writes a token of rank 1.
    """

    losses: Losses
    ranks: npt.NDArray[np.int64]


@contextmanager
def open_engine(
    model: str, config: CacheConfig, num_tokens: int, **options: Any
) -> Iterator[LLM]:
    """An engine that serves requests of ``num_tokens`` tokens by ``config``.

    Args:
        model: a local folder or a name, as vLLM takes it.
        config: what is compared.
        num_tokens: of the longest request, prompt and output.
        options: of vLLM's ``LLM``, beside or instead of the defaults here.
    """
    # Before vLLM is imported: an engine in this process, which may be stepped; quiet.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    length = trained_length(model)
    own = config.engine_options(length, num_tokens)
    defaults: dict[str, Any] = {
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 8,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        # vLLM's default there is nearly all memory of the machine.
        defaults |= {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
    llm = LLM(model, **(defaults | own | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def trained_length(model: str) -> int:
    """The length that the model was trained on, by its config.

    Raises:
        ValueError: when the config says none.
    """
    from transformers import AutoConfig

    text_config = AutoConfig.from_pretrained(model).get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        length = getattr(text_config, name, None)
        if isinstance(length, int):
            return length
    raise ValueError(f"the config of {model} names no trained length")


def score(llm: LLM, tokens: Sequence[int], name: str = "") -> Losses:
    """Losses in nats of all tokens but the first, ``[len(tokens) - 1]``.

    Args:
        llm: of ``open_engine``.
        tokens: the text.
        name: of the progress bar; none is shown without it.
    """
    return score_many(llm, [tokens], name)[0]


def score_many(
    llm: LLM, texts: Sequence[Sequence[int]], name: str = ""
) -> list[Losses]:
    """As ``score``, of several texts at once."""
    return [scores.losses for scores in score_with_ranks(llm, texts, name)]


def score_with_ranks(
    llm: LLM, texts: Sequence[Sequence[int]], name: str = ""
) -> list[Scores]:
    """As ``score_many``, with the tokens' ranks."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )
    prompts: list[Any] = [{"prompt_token_ids": list(text)} for text in texts]
    llm.enqueue(prompts, params, use_tqdm=False)
    engine = llm.llm_engine
    finished = []
    total = sum(map(len, texts))
    with tqdm(
        total=total, desc=name, unit="token", unit_scale=True, disable=not name
    ) as bar:
        while engine.has_unfinished_requests():
            finished += [output for output in engine.step() if output.finished]
            bar.update(min(CHUNK, total - bar.n))
    finished.sort(key=lambda output: int(output.request_id.split("-")[0]))
    return [_prompt_scores(output.prompt_logprobs) for output in finished]


def _prompt_scores(logprobs: Any) -> Scores:
    # Flat: the first of a position's entries is the prompt's own token, the first
    # position has none.
    starts = np.asarray(logprobs.start_indices[1:], np.int64)
    return Scores(
        -np.asarray(logprobs.logprobs, np.float64)[starts],
        np.asarray(logprobs.ranks, np.int64)[starts],
    )


def recompute(
    llm: LLM,
    tokens: Sequence[int],
    positions: Sequence[int],
    window: int,
    prefix: Sequence[int],
    name: str = "",
) -> Losses:
    """Losses of single tokens, each after a window that is encoded anew for it.

    Args:
        llm: of ``open_engine`` with the config ``recompute``.
        tokens: the text.
        positions: of the tokens in question, at least 1.
        window: tokens that come before each, ``prefix`` included.
        prefix: what the tokenizer puts before a text, as a BOS token.
        name: of the progress bar.

    Returns:
        ``[len(positions)]``.
    """
    texts = []
    for position in positions:
        start = position - window
        text = list(tokens[max(0, start) : position + 1])
        if start > 0:
            text = [*prefix, *text[len(prefix) :]]
        texts.append(text)
    return np.array([losses[-1] for losses in score_many(llm, texts, name)])
