# SPDX-License-Identifier: Apache-2.0
"""Detokenization at a cost per token that does not grow with the output.

vLLM's incremental detokenizers append to one string, copied at each token, and decode
again all tokens since a character was last completed, which a stream of special tokens
or of invalid bytes never does. The subclasses here say the same text, from pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers.decoders
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import (
    BaseIncrementalDetokenizer,
    FastIncrementalDetokenizer,
    SlowIncrementalDetokenizer,
)

TEXT_CHARS = 4096
"""The string that vLLM appends to is cut back from twice this length to it."""
PENDING_TOKENS = 64
"""Tokens without a completed character after which they are settled."""
OPEN_TOKENS = 8
"""Last tokens that may still become part of a character; a byte each takes four."""
CONTEXT_TOKENS = 64
"""Prompt tokens that the decoder sees before the output."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class BoundedText(BaseIncrementalDetokenizer):
    """Moves text that no stop string can reach any more out of ``output_text``."""

    output_text: str
    _last_output_text_offset: int
    _settled: list[str]
    _keeps_text: bool

    def adopt(
        self, detokenizer: BaseIncrementalDetokenizer, params: SamplingParams
    ) -> None:
        """Take over the state of vLLM's fresh ``detokenizer``."""
        self.__dict__.update(detokenizer.__dict__)
        self._settled = []
        # A client that receives deltas has the text already.
        self._keeps_text = params.output_kind != RequestOutputKind.DELTA
        reach = max(map(len, self.stop), default=0)
        self._limit = 2 * max(TEXT_CHARS, 2 * reach)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """See ``BaseIncrementalDetokenizer``."""
        stop: str | None = super().update(new_token_ids, stop_terminated)
        if len(self.output_text) >= self._limit:
            cut = len(self.output_text) - self._limit // 2
            if self._keeps_text:
                self._settled.append(self.output_text[:cut])
            else:
                cut = min(cut, self._last_output_text_offset)
            self.output_text = self.output_text[cut:]
            self._last_output_text_offset = max(0, self._last_output_text_offset - cut)
        return stop

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """See ``BaseIncrementalDetokenizer``."""
        text: str = super().get_next_output_text(finished, delta)
        return text if delta else "".join((*self._settled, text))


class FastStreamDetokenizer(BoundedText, FastIncrementalDetokenizer):
    """Over the ``DecodeStream`` of a fast tokenizer.

    Tokens that have not completed a character are decoded by themselves once there
    are many of them. Their text is held back until the next character is complete, as
    vLLM's own is.
    """

    _context: list[int]
    _pending: list[int]

    def __init__(
        self, detokenizer: FastIncrementalDetokenizer, request: EngineCoreRequest
    ) -> None:
        """Take over a fresh ``detokenizer`` of ``request``."""
        self.adopt(detokenizer, request.sampling_params)
        self._held: list[str] = []
        self._special: set[int] | None = None
        self._restart(*self._split_prompt(request.prompt_token_ids or []))

    def _split_prompt(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """The prompt's last tokens that say something, and a character it leaves open.

        The decoder must see what stands before the output, not all of the prompt,
        which it would decode at each token until a character is complete.
        """
        count = CONTEXT_TOKENS
        while count < len(prompt) and not self._decode(prompt[-count:]):
            count *= 4
        context = prompt[-count:]
        for cut in range(len(context), max(-1, len(context) - OPEN_TOKENS), -1):
            if not self._decode(context[:cut]).endswith(REPLACEMENT):
                return context[:cut], context[cut:]
        return [], []

    def _protected_step(self, next_token_id: int) -> str | None:
        text: str | None = super()._protected_step(next_token_id)
        self._pending.append(next_token_id)
        if text:
            self._context, self._pending = self._pending, []
            self._next_try = PENDING_TOKENS
            text = "".join((*self._held, text))
            self._held = []
        elif len(self._pending) >= self._next_try:
            self._settle()
        return text

    def _settle(self) -> None:
        """Let the decode stream begin anew behind tokens whose text is certain."""
        context, pending = self._context, self._without_silent(self._pending)
        if len(pending) <= len(self._pending) // 2:
            self._restart(context, pending)
            return
        self._next_try = 2 * len(self._pending)
        known = self._decode(context)
        full = self._decode(context + pending)
        last = len(pending) - OPEN_TOKENS
        for cut in range(last, last - OPEN_TOKENS, -1):
            certain = self._decode(context + pending[:cut])
            if certain.startswith(known) and (
                certain + self._decode(pending[cut:]) == full
            ):
                self._held.append(certain[len(known) :])
                self._restart([], pending[cut:])
                return

    def _without_silent(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` less those that decoding skips, wherever they stand."""
        if self._special is None:
            added = self.tokenizer.get_added_tokens_decoder()
            self._special = {
                index
                for index, token in added.items()
                if token.special and self.skip_special_tokens
            }
        return [
            index
            for index in token_ids
            if index not in self._special
            and self.tokenizer.id_to_token(index) is not None
        ]

    def _restart(self, context: list[int], pending: list[int]) -> None:
        # On the module, where VLLM_USE_FASTOKENS puts another one.
        self.stream = tokenizers.decoders.DecodeStream(
            ids=context, skip_special_tokens=self.skip_special_tokens
        )
        self._context, self._pending = context, []
        self._next_try = PENDING_TOKENS
        for token in pending:
            text = self.stream.step(self.tokenizer, token)
            self._pending.append(token)
            if text:
                self._held.append(text)
                self._context, self._pending = self._pending, []

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=self.skip_special_tokens
        )
        return text


class SlowStreamDetokenizer(BoundedText, SlowIncrementalDetokenizer):
    """Over a Python tokenizer; keeps the tokens that may still be decoded again."""

    prefix_offset: int
    read_offset: int

    def __init__(
        self, detokenizer: SlowIncrementalDetokenizer, request: EngineCoreRequest
    ) -> None:
        """Take over a fresh ``detokenizer`` of ``request``."""
        self.adopt(detokenizer, request.sampling_params)

    def decode_next(self, next_token_id: int) -> str:
        """See ``SlowIncrementalDetokenizer``."""
        text: str = super().decode_next(next_token_id)
        if self.prefix_offset >= CONTEXT_TOKENS:
            del self.tokens[: self.prefix_offset]
            self.read_offset -= self.prefix_offset
            self.prefix_offset = 0
        return text


BOUNDED_CLASSES: dict[type, Callable[[Any, EngineCoreRequest], BoundedText]] = {
    FastIncrementalDetokenizer: FastStreamDetokenizer,
    SlowIncrementalDetokenizer: SlowStreamDetokenizer,
}
"""Which of them stands in for which class of vLLM's."""
