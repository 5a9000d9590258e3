# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of streams: drafters that see bounded texts and ring tables.

Verified tokens are those of decoding one by one, whatever was drafted: attention and
positions depend on text positions alone, and a rejected token's slot is written again.
What vLLM's drafters assume of a text, that all of it is at hand and that its blocks
stand in the order of the text, is put right here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.ngram_proposer import NgramProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID, compute_new_slot_mapping

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.kv_cache import group_spec
from sink_paged.penalties import apply_penalties
from sink_paged.stream_state import OutputTokens
from sink_paged.streams import RingBlockTable
from sink_paged.token_rows import TokenRows


class StreamNgramProposer(NgramProposer):
    """Looks the last tokens up in as much of a text as a stream keeps resident."""

    looks_back: int

    def propose(
        self,
        num_speculative_tokens: int,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: TokenRows,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """See ``NgramProposer``."""
        num_tokens = num_tokens_no_spec[: len(sampled_token_ids)]
        tails, lengths = token_ids_cpu.tails(num_tokens, self.looks_back)
        proposals: list[list[int]] = super().propose(
            num_speculative_tokens, sampled_token_ids, lengths, tails
        )
        return proposals


class StreamDraftProposer(DraftModelProposer):
    """Runs a draft model whose KV blocks stand in a ring block table.

    vLLM's methods leave a position past ``max_model_len`` without a slot; that is set
    to what the table has columns for, so that none is looked up beyond them, and the
    slots are then computed here.
    """

    table: RingBlockTable

    def set_inputs_first_pass(
        self, *args: Any, cad: CommonAttentionMetadata, **kwargs: Any
    ) -> tuple[int, Tensor, CommonAttentionMetadata]:
        """See ``SpecDecodeBaseProposer``: the tokens that the model has not read."""
        num_tokens, to_sample, extended = super().set_inputs_first_pass(
            *args, cad=cad, **kwargs
        )
        slots = compute_new_slot_mapping(
            cad=cad,
            new_positions=self.table.in_ring(self.positions[:num_tokens]),
            is_rejected_token_mask=self.is_rejected_token_mask[:num_tokens],
            block_size=self.block_size,
            num_new_tokens=self.net_num_new_slots_per_request,
            max_model_len=self.max_model_len,
        )
        return num_tokens, to_sample, extended.replace(slot_mapping=slots)

    def _update_positions_dependent_metadata(
        self,
        positions: Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        batch_size: int,
        input_batch_size: int,
        block_size: int,
    ) -> Tensor:
        """Positions, slots and lengths of the next draft token."""
        metadata = common_attn_metadata
        positions = positions + 1
        self.positions[:batch_size] = positions
        in_ring = self.table.in_ring(positions)
        blocks = metadata.block_table_tensor.gather(
            1, (in_ring // block_size)[:, None].long()
        )
        slots = self._slot_mapping_buffer[:input_batch_size]
        slots[:batch_size] = blocks[:, 0] * block_size + in_ring % block_size
        slots[batch_size:] = PADDING_SLOT_ID
        metadata.slot_mapping = slots[:batch_size]
        metadata.seq_lens += 1
        metadata.max_seq_len += 1
        if metadata.seq_lens_cpu_upper_bound is not None:
            metadata.seq_lens_cpu_upper_bound += 1
        return self.positions[:batch_size]


class Drafted(list[int]):
    """Output tokens as they would be with some drafted ones.

    Attributes:
        counts: of a stream with penalties, the drafted tokens' among them; else None.
    """

    def __init__(self, tokens: OutputTokens, drafts: list[int]) -> None:
        """Put ``drafts`` behind what is kept of ``tokens``."""
        super().__init__([*tokens, *drafts])
        self.counts = tokens.counts and tokens.counts.with_output(drafts)


def before_bonus(outputs: list[Any], drafts: list[list[int]] | None) -> list[Any]:
    """Output tokens of each request before its bonus token, if all drafts hold."""
    if drafts is None:
        return outputs
    return [
        Drafted(tokens, draft) if draft else tokens
        for tokens, draft in zip(outputs, drafts, strict=False)
    ]


def before_drafts(outputs: list[Any], drafts: list[list[int]] | None) -> list[Any]:
    """Output tokens before each drafted one, request after request."""
    if drafts is None:
        return outputs
    return [
        Drafted(tokens, draft[:count])
        for tokens, draft in zip(outputs, drafts, strict=False)
        for count in range(len(draft))
    ]


class Factors(NamedTuple):
    """What ``apply_penalties`` reads of vLLM's ``SamplingMetadata``."""

    no_penalties: bool
    repetition_penalties: Tensor
    frequency_penalties: Tensor
    presence_penalties: Tensor


def apply_penalties_to_drafts(
    logits: Tensor,
    sampling_metadata: Any,
    metadata: Any,
    repeat_indices: Tensor,
    output_token_ids: list[Any],
) -> Tensor:
    """Stands in for ``RejectionSampler.apply_penalties``.

    Args:
        logits: ``[num_drafts, vocab_size]``, changed in place.
        sampling_metadata: the batch's.
        metadata: of the drafts; not needed.
        repeat_indices: the request of each draft.
        output_token_ids: what ``before_drafts`` says.
    """
    if sampling_metadata.no_penalties:
        return logits
    factors = Factors(
        False,
        sampling_metadata.repetition_penalties[repeat_indices],
        sampling_metadata.frequency_penalties[repeat_indices],
        sampling_metadata.presence_penalties[repeat_indices],
    )
    return apply_penalties(logits, factors, output_token_ids)


class DraftModel(NamedTuple):
    """A draft model that has been loaded.

    Attributes:
        model: the model.
        vllm_config: as it sees it.
        max_tokens: the most tokens of a step.
    """

    model: nn.Module
    vllm_config: VllmConfig
    max_tokens: int


def draft_model(runner: Any) -> DraftModel | None:
    """The draft model of model runner V1, if it has loaded one."""
    drafter = getattr(runner, "drafter", None)
    if not isinstance(drafter, DraftModelProposer):
        return None
    return DraftModel(
        drafter.model, drafter._create_draft_vllm_config(), drafter.max_num_tokens
    )


def enable_speculation(runner: Any, resident_tokens: int) -> None:
    """Let the drafter of ``runner``, if it has one, work on streams.

    Called once the runner's own state is that of streams.

    Args:
        runner: model runner V1.
        resident_tokens: the bound on a stream's resident tokens.
    """
    drafter = getattr(runner, "drafter", None)
    if drafter is None:
        return
    runner.effective_drafter_max_model_len = MAX_STREAM_TOKENS
    runner.sampler._combine_outputs_with_spec_tokens = before_bonus
    runner.rejection_sampler._combine_outputs_with_spec_tokens = before_drafts
    runner.rejection_sampler.apply_penalties = apply_penalties_to_drafts
    if isinstance(drafter, NgramProposer):
        drafter.__class__ = StreamNgramProposer
        drafter.looks_back = resident_tokens
        drafter.max_model_len = MAX_STREAM_TOKENS
        runner.input_batch.token_ids_cpu.looks_back = resident_tokens
        return
    assert isinstance(drafter, DraftModelProposer)
    drafter.__class__ = StreamDraftProposer
    table = runner.input_batch.block_table.block_tables[drafter.kv_cache_gid]
    spec = group_spec(runner.kv_cache_config.kv_cache_groups[drafter.kv_cache_gid])
    drafter.table = table
    drafter.max_model_len = table.max_num_blocks_per_req * spec.block_size
