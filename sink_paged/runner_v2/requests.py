# SPDX-License-Identifier: Apache-2.0
"""What model runner V2 remembers of a stream: not its text.

In vLLM ``all_token_ids`` holds every text, ``[max_num_reqs, max_model_len]`` in pinned
memory. The kernels that go through it need the tokens that have still to be read, which
the host keeps here, and the last few, which bad words are compared with. A row holds
those only, and slides along the text::

    text    [0, n - tail) forgotten      [n - tail, n) the tail      n, next to come
    row                                  [0, tail)                   SPARE_TOKENS more

``total_len`` counts in the row. Everything else counts in the text. A drafter that
looks n-grams up has a longer tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm import envs
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.states import RequestState

from sink_paged.window import cdiv

TAIL = max(64, envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS)
"""Last tokens of a text that stay readable: as many as a bad word can have."""
SPARE_TOKENS = 3 * TAIL
"""Tokens that a row takes behind its tail, before it slides back to that."""
SLIDE_TOKENS = 1 << 20
"""Tokens that are moved at a time, so that what moves them takes little memory."""


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class UnreadTokens:
    """The part of a text that the model has still to read.

    Attributes:
        first: text position of the first token held.
        ids: int32 ``[num_tokens]``.
    """

    def __init__(self, text: Sequence[int], first: int) -> None:
        """Keep the tokens of ``text`` from position ``first`` on."""
        self.first = first
        self.ids = np.array(text[first:], dtype=np.int32)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Tokens at text positions ``[start, stop)``, fewer at the text's end."""
        return self.ids[start - self.first : stop - self.first]

    def forget(self, position: int) -> None:
        """Give up the tokens before a text position, in pieces of half of all."""
        num_read = position - self.first
        if 2 * num_read >= len(self.ids):
            self.ids = self.ids[num_read:].copy()
            self.first = position


class TailRows(StagedWriteTensor):
    """Rows of tokens, of which only the last ``tail`` are written at once."""

    tail: int

    def stage_write(self, index: int, start: int, x: Any) -> None:
        """Write the tail of a text to the beginning of a row."""
        super().stage_write(index, start, x[-self.tail :])


class TailLengths(StagedWriteTensor):
    """Lengths of texts, counted in their rows."""

    tail: int

    def stage_write_elem(self, index: int, x: int) -> None:
        """Write the length of the tail of a text of ``x`` tokens."""
        super().stage_write_elem(index, min(x, self.tail))


class StreamRequestState(RequestState):
    """vLLM's request states, with what they keep of a text bounded.

    Attributes:
        all_token_ids: int32 ``[max_num_reqs, tail + SPARE_TOKENS]``.
        tail: last tokens of a text that stay readable.
        total_len: int32 ``[max_num_reqs]``, where in its row a text goes on.
        row_prompt_len: the prompt's end in the row's positions, so often negative,
            int32 ``[max_num_reqs]``.
        unread: by row, what has still to be read of the text.
        texts: by row, the whole texts of requests that are being added.
        targets: the tokens that follow those of the step, int64 ``[num_tokens]``, zero
            where the text does not say; None when nobody asked.
    """

    tail: int
    row_prompt_len: StagedWriteTensor
    unread: dict[int, UnreadTokens]
    texts: dict[int, list[int]]
    targets: Tensor | None
    _row_end: npt.NDArray[np.int64]

    @classmethod
    def adopt(cls, states: RequestState, looks_back: int = 0) -> StreamRequestState:
        """Take over the state of a runner that has no requests yet.

        Args:
            states: of the runner.
            looks_back: last tokens of a text that a drafter reads.
        """
        streams = cls.__new__(cls)
        streams.__dict__.update(states.__dict__)
        n, device = states.max_num_reqs, states.device
        tail = streams.tail = max(TAIL, looks_back)
        rows = TailRows((n, tail + SPARE_TOKENS), torch.int32, device)
        lengths = TailLengths(n, torch.int32, device)
        rows.tail = lengths.tail = tail
        streams.all_token_ids, streams.total_len = rows, lengths
        streams.row_prompt_len = StagedWriteTensor(n, torch.int32, device)
        streams.unread, streams.texts, streams.targets = {}, {}, None
        streams._row_end = np.zeros(n, dtype=np.int64)
        return streams

    def add_request(
        self,
        req_id: str,
        prompt_len: int,
        all_token_ids: list[int],
        num_computed_tokens: int,
        max_tokens: int,
    ) -> None:
        """See ``RequestState``."""
        super().add_request(
            req_id=req_id,
            prompt_len=prompt_len,
            all_token_ids=all_token_ids,
            num_computed_tokens=num_computed_tokens,
            max_tokens=max_tokens,
        )
        row = self.req_id_to_index[req_id]
        tail = min(len(all_token_ids), self.tail)
        self.row_prompt_len.stage_write_elem(
            row, prompt_len - len(all_token_ids) + tail
        )
        self._row_end[row] = tail
        self.texts[row] = all_token_ids
        self.unread[row] = UnreadTokens(all_token_ids, num_computed_tokens)

    def apply_staged_writes(self) -> None:
        """See ``RequestState``."""
        super().apply_staged_writes()
        self.row_prompt_len.apply_write()

    def remove_request(self, req_id: str) -> int | None:
        """See ``RequestState``."""
        row: int | None = super().remove_request(req_id)
        if row is not None:
            self.unread.pop(row, None)
        return row

    def read_prompts(
        self,
        rows: npt.NDArray[np.intp],
        num_read: npt.NDArray[np.int32],
        num_scheduled: npt.NDArray[np.int32],
        input_ids: Tensor,
        with_targets: bool,
    ) -> None:
        """Write the tokens that a step reads of its texts, and forget them.

        Args:
            rows: of the step's requests.
            num_read: tokens of each that have been read.
            num_scheduled: tokens that the step reads.
            input_ids: int32, written; a token that has just been sampled, which the
                host does not know, becomes zero.
            with_targets: whether to set ``targets``.
        """
        ends = np.cumsum(num_scheduled)
        ids = np.zeros(int(ends[-1]), dtype=np.int32)
        targets = np.zeros_like(ids, dtype=np.int64)
        for row, start, count, end in zip(
            rows.tolist(),
            num_read.tolist(),
            num_scheduled.tolist(),
            ends.tolist(),
            strict=True,
        ):
            unread = self.unread.get(row)
            if unread is None:
                continue
            first = end - count
            part = unread.read(start, start + count)
            ids[first : first + len(part)] = part
            if with_targets:
                following = unread.read(start + 1, start + count + 1)
                targets[first : first + len(following)] = following
            unread.forget(start + count)
            if not len(unread.ids):
                del self.unread[row]
        input_ids[: len(ids)].copy_(to_device(ids, self.device))
        self.targets = to_device(targets, self.device) if with_targets else None

    def make_room(self, rows: npt.NDArray[np.intp]) -> None:
        """Have room for the tokens that the step may write into each of ``rows``.

        How many of the drafted ones will be accepted the host does not know.
        """
        most = 1 + self.num_speculative_steps
        full = rows[self._row_end[rows] + most > self.all_token_ids.gpu.shape[1]]
        if len(full):
            for part in np.array_split(full, cdiv(len(full) * self.tail, SLIDE_TOKENS)):
                self._slide(part)
            self._row_end[full] = self.tail
        self._row_end[rows] += most

    def _slide(self, rows: npt.NDArray[np.intp]) -> None:
        index = to_device(rows.astype(np.int64), self.device)
        shift = (self.total_len.gpu[index] - self.tail).clamp(min=0)
        tail = shift[:, None] + torch.arange(self.tail, device=self.device)
        tokens = self.all_token_ids.gpu
        tokens[index, : self.tail] = tokens[index[:, None], tail]
        self.total_len.gpu[index] -= shift
        self.row_prompt_len.gpu[index] -= shift
