# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers of a stream, against plain lists."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.worker.gpu_input_batch import InputBatch

from sink_paged.penalties import apply_penalties
from sink_paged.stream_state import BlockIds, OutputTokens, TokenCounts

VOCAB = 50
tokens = st.integers(0, VOCAB - 1)


@given(
    st.lists(tokens, max_size=30),
    st.lists(st.lists(tokens, max_size=7), max_size=30),
    st.integers(1, 9),
)
def test_output_tokens_answer_as_a_list(
    first: list[int], added: list[list[int]], kept: int
) -> None:
    counts = TokenCounts(torch.tensor([], dtype=torch.int64), VOCAB)
    output = OutputTokens(first, kept, counts)
    text = list(first)
    for piece in added:
        output.extend(piece)
        text += piece
        assert len(output) == len(text)
        assert bool(output) == bool(text)
        assert output[-kept:] == text[-kept:]
        if text:
            assert output[-1] == output[len(text) - 1] == text[-1]
        assert counts.in_output.tolist() == np.bincount(text, minlength=VOCAB).tolist()
    taken = min(kept, len(text))
    del output[len(text) - taken :]
    del text[len(text) - taken :]
    assert len(output) == len(text)
    assert counts.in_output.tolist() == np.bincount(text, minlength=VOCAB).tolist()
    output.clear()
    assert not output
    assert not counts.in_output.any()


def test_forgotten_tokens_are_not_made_up() -> None:
    output = OutputTokens(range(1000), kept=10)
    output.forget()
    assert len(output) == 1000
    assert output[990:] == list(range(990, 1000))
    for read in (lambda: output[5], lambda: output[:], lambda: output[-11]):
        with pytest.raises(IndexError, match="forgotten"):
            read()
    with pytest.raises(IndexError):
        output[1000]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 3), st.integers(1, 6))
def test_block_ids_keep_the_pinned_and_the_last(
    added: list[int], pinned: int, ring: int
) -> None:
    ids = BlockIds([], pinned, ring)
    text: list[int] = []
    for count in added:
        new = list(range(len(text), len(text) + count))
        ids.extend(new)
        text += new
    assert ids.num_blocks == len(text)
    assert list(ids) == text[:pinned] + text[pinned:][-ring:]


def test_penalties_are_those_of_vllm() -> None:
    """Three requests, the second without penalties, after 300 output tokens each."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, VOCAB, generator=generator)
    prompts = [
        torch.randint(VOCAB, (length,), generator=generator) for length in (5, 9, 30)
    ]
    outputs = torch.randint(VOCAB, (3, 300), generator=generator).tolist()
    factors = {
        "presence_penalties": torch.tensor([0.7, 0.0, -0.4]),
        "frequency_penalties": torch.tensor([0.3, 0.0, 0.0]),
        "repetition_penalties": torch.tensor([1.3, 1.0, 0.8]),
    }
    padded = torch.full((3, 30), VOCAB)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    expected = apply_all_penalties(
        logits.clone(), padded, **factors, output_token_ids=outputs
    )
    metadata = SamplingMetadata.__new__(SamplingMetadata)
    metadata.__dict__.update(factors, no_penalties=False)
    counted = [
        OutputTokens(
            text, counts=None if row == 1 else TokenCounts(prompts[row], VOCAB)
        )
        for row, text in enumerate(outputs)
    ]
    for text in counted:
        text.forget()
    actual = apply_penalties(logits.clone(), metadata, counted)
    assert not torch.equal(actual, logits)
    assert torch.equal(actual, expected)
    metadata.no_penalties = True
    assert torch.equal(apply_penalties(logits.clone(), metadata, counted), logits)


@pytest.mark.parametrize("asked", [True, False], ids=["penalised", "not asked for"])
def test_placeholders_of_asynchronous_scheduling(asked: bool) -> None:
    """vLLM's own code puts tokens in their places, once they are asked for."""
    counts = TokenCounts(torch.tensor([], dtype=torch.int64), VOCAB)
    output = OutputTokens([], 4, counts if asked else None)
    batch = SimpleNamespace(
        sampling_metadata=SimpleNamespace(output_token_ids=[output]),
        prev_req_id_to_index={"stream": 0},
        async_copy_ready_event=SimpleNamespace(synchronize=lambda: None),
        req_ids=["stream"],
    )
    sampled = [7 * step % VOCAB for step in range(100)]
    for step in range(len(sampled)):
        if step and (asked or step == 99):
            batch.sampled_token_ids_cpu = torch.tensor([[sampled[step - 1]]])
            InputBatch.update_async_output_token_ids(batch)
            assert output[-1] == sampled[step - 1]
        if asked:
            assert counts.in_output.sum() == step
            assert output[-4:] == sampled[max(0, step - 4) : step]
        output.append(-1)
    assert len(output) <= 100
    if asked:
        assert len(output) == 100
        expected = np.bincount(sampled[:-1], minlength=VOCAB)
        assert counts.in_output.tolist() == expected.tolist()
