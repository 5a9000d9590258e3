# SPDX-License-Identifier: Apache-2.0
"""The model runner's state of a stream, which does not grow with its text.

``enable_streams`` replaces the persistent batch of vLLM's runner: its block tables
become rings of columns, its token rows hold what has still to be read, and what it
remembers of a request is bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.kv_cache import group_spec
from sink_paged.penalties import apply_penalties
from sink_paged.stream_state import (
    BlockIds,
    OutputTokens,
    TokenCounts,
    has_penalties,
    needed_tail,
)
from sink_paged.token_loops import ring_positions
from sink_paged.token_rows import TRIM_TOKENS, TokenRows
from sink_paged.window import BlockWindow

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class RingBlockTable(BlockTable):
    """A block table whose columns are used again as blocks are evicted.

    Block ``k`` of a text stands in column ``k`` while it is pinned, else in
    ``pinned + (k - pinned) % ring``. ``num_blocks_per_row`` counts the text's blocks.
    """

    pinned: int

    @classmethod
    def adopt(cls, table: BlockTable, policy: BlockWindow) -> RingBlockTable:
        """Take over the buffers of ``table``."""
        ring = cls.__new__(cls)
        ring.__dict__.update(table.__dict__)
        ring.pinned = policy.pinned_blocks
        return ring

    @property
    def ring(self) -> int:
        """Columns behind the pinned ones."""
        return int(self.max_num_blocks_per_req) - self.pinned

    def append_row(self, block_ids: list[int], row_idx: int) -> None:
        """Add the text's next blocks; only the last ring of them can still be read."""
        start = int(self.num_blocks_per_row[row_idx])
        added = getattr(block_ids, "num_blocks", len(block_ids))  # BlockIds leave out
        end = start + added
        row = self.block_table.np[row_idx]
        pinned = block_ids[: max(0, self.pinned - start)]
        row[start : start + len(pinned)] = pinned
        last = block_ids[len(pinned) :][-self.ring :]
        blocks = np.arange(end - len(last), end)
        row[self.pinned + (blocks - self.pinned) % self.ring] = last
        self.num_blocks_per_row[row_idx] = end

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: Tensor, positions: Tensor
    ) -> None:
        """Slots of the step's tokens: as stock, at the position of the ring column."""
        super().compute_slot_mapping(num_reqs, query_start_loc, self.in_ring(positions))

    def in_ring(self, positions: Tensor) -> Tensor:
        """Where tokens stand in the ring's columns, for int64 text positions."""
        if positions.is_cuda:
            block = positions // self.block_size
            column = self.pinned + (block - self.pinned) % self.ring
            column = torch.where(block < self.pinned, block, column)
            return column * self.block_size + positions % self.block_size
        in_ring = torch.empty_like(positions)
        ring_positions(
            positions.numpy(), self.block_size, self.pinned, self.ring, in_ring.numpy()
        )
        return in_ring


class StreamInputBatch(InputBatch):
    """vLLM's persistent batch, with what it keeps of a request bounded.

    Attributes:
        token_ids_cpu: in vLLM an array ``[max_num_reqs, max_model_len]``.
    """

    token_ids_cpu: TokenRows
    _tokens_untrimmed: int

    @classmethod
    def adopt(cls, batch: InputBatch) -> StreamInputBatch:
        """Take over the state of an empty ``batch``."""
        streams = cls.__new__(cls)
        streams.__dict__.update(batch.__dict__)
        rows = TokenRows(batch.max_num_reqs)
        streams.token_ids_cpu = rows
        streams.token_ids_cpu_tensor = rows.tensor
        # Prompt embeddings are refused: one byte, True, stands for all.
        streams.is_token_ids = np.lib.stride_tricks.as_strided(
            np.ones(1, dtype=np.bool_), rows.shape, (0, 0)
        )
        streams.max_model_len = MAX_STREAM_TOKENS
        # These may look back at any token of a text.
        streams._keeps_texts = (
            batch.logitsprocs_need_output_token_ids
            or getattr(batch, "thinking_budget_state_holder", None) is not None
        )
        streams._scored = []
        streams._tokens_untrimmed = 0
        return streams

    def add_request(self, request: CachedRequestState) -> int:
        """Write what has still to be read into a row, and keep no more than that."""
        request.block_ids = tuple(
            ids
            if isinstance(ids, BlockIds)
            else BlockIds(ids, pinned=table.pinned, ring=table.ring)
            for ids, table in zip(
                request.block_ids, self.block_table.block_tables, strict=True
            )
        )
        params = request.sampling_params
        if not isinstance(request.prompt_token_ids, list):
            raise RuntimeError(f"stream {request.req_id} came back without its text")
        counts = None
        if has_penalties(params):
            counts = TokenCounts(prompt_tensor(request), self.vocab_size)
        kept = MAX_STREAM_TOKENS if self._keeps_texts else needed_tail(params)
        request.output_token_ids = OutputTokens(request.output_token_ids, kept, counts)
        if self._keeps_texts:
            return int(super().add_request(request))
        scored = params.prompt_logprobs is not None
        if scored:
            request.prompt_token_ids = prompt_tensor(request)
        row: int = super().add_request(request)
        request.output_token_ids.forget()
        if scored:
            self._scored.append(request)
        else:
            forget_prompt(request)
        return row

    def forget_read(self, rows_before: int, num_tokens: int) -> None:
        """Give back the memory of what a step has read.

        Args:
            rows_before: requests of the batch before the step.
            num_tokens: of the step.
        """
        rows, num_reqs = self.token_ids_cpu, self.num_reqs
        rows.release(num_reqs, rows_before)
        self._tokens_untrimmed += num_tokens
        if self._tokens_untrimmed >= TRIM_TOKENS:  # before, no row can have as many
            rows.trim(self.num_computed_tokens_cpu[:num_reqs])
            self._tokens_untrimmed = 0
        for request in self._scored[:]:
            if (
                request.num_computed_tokens >= request.num_prompt_tokens
                or request.req_id not in self.req_id_to_index
            ):
                forget_prompt(request)
                self._scored.remove(request)

    def _register_add_request(self, request: CachedRequestState) -> int:
        row: int = super()._register_add_request(request)
        self.token_ids_cpu.begin(row, request.num_computed_tokens)
        return row

    def _make_prompt_token_ids_cpu_tensor(self) -> Tensor:
        """Nothing: penalties are computed from counts."""
        return torch.empty((self.num_reqs, 0), dtype=torch.int64)


def prompt_tensor(request: CachedRequestState) -> Tensor:
    """The prompt's tokens, int64 ``[num_prompt_tokens]``."""
    return torch.tensor(request.prompt_token_ids, dtype=torch.int64)


def forget_prompt(request: CachedRequestState) -> None:
    """Leave of the prompt's tokens their number."""
    request.prompt_token_ids = torch.zeros(1, dtype=torch.int64).expand(
        request.num_prompt_tokens
    )


def restore_text(request: CachedRequestState, token_ids: list[int]) -> None:
    """Give a request back its text, which the scheduler sends before it is added."""
    request.prompt_token_ids = token_ids[: request.num_prompt_tokens]
    request.output_token_ids = token_ids[request.num_prompt_tokens :]


def enable_streams(runner: GPUModelRunner) -> None:
    """Let the requests of ``runner`` grow past ``max_model_len``.

    Called once its KV cache is initialised.
    """
    runner.input_batch = StreamInputBatch.adopt(runner.input_batch)
    runner.max_model_len = MAX_STREAM_TOKENS
    runner.sampler.apply_penalties = apply_penalties
    tables = runner.input_batch.block_table.block_tables
    for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        policy = group_spec(group).blocks
        tables[index] = RingBlockTable.adopt(tables[index], policy)
