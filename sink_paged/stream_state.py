# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers of a stream: not its text, what is still asked about it.

vLLM's worker keeps lists of a request's tokens and blocks. Here their places are taken
by objects that answer the same questions from a bounded memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

PLACEHOLDER = -1
"""vLLM's token that has been sampled but not yet copied from the device."""
UNSEEN = -2
"""A token that nobody asked for in time."""
IN_FLIGHT = 2
"""Placeholders of a stream that may yet become tokens."""
TAIL_TOKENS = 64
"""Output tokens that stay readable, more where a bad word is longer."""


class TokenCounts:
    """How often a stream's tokens came: what penalties are computed from.

    Attributes:
        in_prompt: bool ``[vocab_size]``.
        in_output: int32 ``[vocab_size]``.
    """

    def __init__(self, prompt: Tensor, vocab_size: int) -> None:
        """Count the prompt's tokens, int64 ``[num_tokens]``."""
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool)
        self.in_prompt[prompt] = True
        self.in_output: npt.NDArray[np.int32] = np.zeros(vocab_size, dtype=np.int32)

    def add_output(self, ids: list[int], change: int = 1) -> None:
        """Count the output tokens ``ids``, placeholders left out, ``change`` times."""
        np.add.at(self.in_output, [token for token in ids if token >= 0], change)

    def with_output(self, ids: list[int]) -> TokenCounts:
        """A copy that has counted the output tokens ``ids`` too."""
        counts = copy.copy(self)
        counts.in_output = self.in_output.copy()
        counts.add_output(ids)
        return counts


class OutputTokens(list[int]):
    """Output tokens of a stream: their number, the last few, and maybe counts.

    Takes the place of ``CachedRequestState.output_token_ids`` and is indexed like it.

    Attributes:
        counts: of a stream with penalties, else None.
    """

    def __init__(
        self,
        ids: Iterable[int] = (),
        kept: int = TAIL_TOKENS,
        counts: TokenCounts | None = None,
    ) -> None:
        """Start with the tokens ``ids``, all of them readable until ``forget``."""
        super().__init__()
        self.counts = counts
        self._kept = kept
        self._forgotten = 0
        self._add(ids)

    def __len__(self) -> int:
        """All tokens, forgotten ones too."""
        return self._forgotten + super().__len__()

    def extend(self, ids: Iterable[int]) -> None:
        """Add tokens at the end."""
        self._add(ids)
        if super().__len__() >= 2 * self._kept:
            self.forget()

    def append(self, token: int) -> None:
        """Add a token at the end."""
        self.extend((token,))

    def _add(self, ids: Iterable[int]) -> None:
        ids = list(ids)
        super().extend(ids)
        self._count(ids, 1)
        # vLLM goes back over placeholders, which must not be forgotten then.
        stale = super().__len__() - IN_FLIGHT - 1
        if stale >= 0 and super().__getitem__(stale) == PLACEHOLDER:
            super().__setitem__(stale, UNSEEN)

    def _count(self, ids: list[int], change: int) -> None:
        if self.counts is not None:
            self.counts.add_output(ids, change)

    def forget(self) -> None:
        """Keep only the last tokens."""
        excess = max(0, super().__len__() - self._kept)
        super().__delitem__(slice(0, excess))
        self._forgotten += excess

    def clear(self) -> None:
        """Begin anew."""
        super().clear()
        self._forgotten = 0
        if self.counts is not None:
            self.counts.in_output[:] = 0

    def __getitem__(self, key: Any) -> Any:
        """A token or a list of tokens.

        Raises:
            IndexError: one of them has been forgotten.
        """
        if not self._forgotten:
            return super().__getitem__(key)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            self._check_kept(min(start, stop))
            return super().__getitem__(
                slice(start - self._forgotten, stop - self._forgotten, step)
            )
        index = key + len(self) if key < 0 else key
        self._check_kept(index)
        return super().__getitem__(index - self._forgotten)

    def __delitem__(self, key: Any) -> None:
        """Take back the last tokens, ``del tokens[n:]``."""
        start, stop, step = key.indices(len(self))
        if (stop, step) != (len(self), 1):
            raise IndexError("only the last output tokens can be taken back")
        self._check_kept(start)
        self._count(self[start:], -1)
        super().__delitem__(slice(start - self._forgotten, None))

    def __setitem__(self, key: Any, ids: Any) -> None:
        """Put other tokens in the place of the last ones, ``tokens[n:] = ids``."""
        del self[key]
        self.extend(ids)

    def _check_kept(self, index: int) -> None:
        if index < self._forgotten:
            raise IndexError(
                f"output token {index} is not kept: {self._forgotten} are forgotten"
            )


class BlockIds(list[int]):
    """Block ids of a stream: the pinned ones and the last ring of the others.

    Takes the place of a list in ``CachedRequestState.block_ids``.

    Attributes:
        num_blocks: blocks of the text, those left out too.
    """

    def __init__(self, ids: Iterable[int], pinned: int, ring: int) -> None:
        """Keep what ``RingBlockTable`` has columns for."""
        super().__init__()
        self._pinned, self._ring = pinned, ring
        self.num_blocks = 0
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add the text's next blocks."""
        held = len(self)
        super().extend(ids)
        self.num_blocks += len(self) - held
        del self[self._pinned : max(self._pinned, len(self) - self._ring)]


def needed_tail(params: SamplingParams) -> int:
    """Output tokens that the sampler may look back at."""
    bad_words = params.bad_words_token_ids or []
    return max([TAIL_TOKENS, *map(len, bad_words)])


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request's logits depend on how often its tokens came."""
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
    )
