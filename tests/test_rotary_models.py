# SPDX-License-Identifier: Apache-2.0
"""Rotary models through the real engine, against the token-by-token oracle."""

from pathlib import Path

import pytest

from tests.engines import (
    NEAR_TIE,
    engine,
    generate,
    greedy,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.families import make_model, text
from tests.oracle import greedy_deficit, stream_losses
from tests.oracle_hf import StreamingModel

SINKS = (4, 60)
LOSS_TOLERANCE = 1e-3
STOCK_TOLERANCE = 1e-4
LONG, SHORT = 400, 60
GREEDY_TOKENS = {
    "Llama (MHA)": LONG,
    "Llama (GQA)": LONG,
    "Pythia / GPT-NeoX": LONG,
    "Llama 3 (llama3 scaling)": SHORT,
    "Llama (linear scaling)": SHORT,
    "Llama (YaRN)": SHORT,
    "Yi": SHORT,
    "Mistral": SHORT,
    "Qwen2": SHORT,
    "Qwen3": SHORT,
    "Phi-3": SHORT,
    "Cohere": SHORT,
    "GLM-4": SHORT,
    "StableLM": SHORT,
    "Phi-2": SHORT,
    "GLM-4 9B (HF)": SHORT,
    "OLMo 2": SHORT,
    "StarCoder2": SHORT,
}


@pytest.mark.parametrize("family", GREEDY_TOKENS)
def test_losses_and_tokens(family: str, tmp_path: Path) -> None:
    count = GREEDY_TOKENS[family]
    make_model(family, tmp_path)
    ids = text(300)
    losses = stream_losses(StreamingModel(make_model(family), *SINKS), ids)
    with engine(tmp_path, SINKS, max_num_batched_tokens=128) as llm:
        short, read, written = generate(
            llm,
            [ids[:60], ids, ids[:90]],
            [*[greedy(1, prompt_logprobs=0)] * 2, greedy(count)],
        )
        assert pool_is_empty(llm)
    error = worst(prompt_losses(read), losses)
    assert error < LOSS_TOLERANCE
    tokens = list(written.outputs[0].token_ids)
    assert len(tokens) == count
    oracle = StreamingModel(make_model(family), *SINKS)
    assert greedy_deficit(oracle, ids[:90], tokens) < NEAR_TIE
    with engine(tmp_path, None) as llm:
        stock = generate(llm, [ids[:60]], greedy(1, prompt_logprobs=0))[0]
    assert worst(prompt_losses(short), prompt_losses(stock)) < STOCK_TOLERANCE
