# SPDX-License-Identifier: Apache-2.0
"""Rotary models through the real engine, against the token-by-token oracle."""

from pathlib import Path

import pytest

from tests.against_oracle import check_family
from tests.engines import (
    engine,
    generate,
    greedy,
    make_llama,
    prompt_losses,
    worst,
)
from tests.families import make_model, text
from tests.oracle import stream_losses
from tests.oracle_hf import StreamingModel
from tests.stream_checks import LOSS_TOLERANCE

LONG, SHORT = 400, 60
GREEDY_TOKENS = {
    "Llama (MHA)": LONG,
    "Llama (GQA)": LONG,
    "Pythia, GPT-NeoX": LONG,
    "Llama 3": SHORT,
    "Llama, linear scaling": SHORT,
    "Llama, YaRN": SHORT,
    "Yi": SHORT,
    "Mistral": SHORT,
    "Qwen2": SHORT,
    "Qwen3": SHORT,
    "Phi-3": SHORT,
    "Phi-3 long context": SHORT,
    "Cohere": SHORT,
    "GLM-4-0414": SHORT,
    "GLM-4-9B": SHORT,
    "StableLM": SHORT,
    "Phi-1, Phi-2": SHORT,
    "OLMo 2": SHORT,
    "StarCoder2": SHORT,
}


@pytest.mark.family
@pytest.mark.parametrize("family", GREEDY_TOKENS)
def test_losses_and_tokens(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path, (4, 60), GREEDY_TOKENS[family])


def test_compiled_on_the_transformers_backend(tmp_path: Path) -> None:
    """The rows of the step are set outside of the compiled code."""
    family = "Pythia, GPT-NeoX"
    make_model(family, tmp_path)
    ids = text(200)
    losses = stream_losses(StreamingModel(make_model(family), 4, 60), ids)
    options = {"enforce_eager": False, "max_num_batched_tokens": 128}
    with engine(tmp_path, (4, 60), **options) as llm:
        for prompt in (ids[:100], ids):
            read = generate(llm, [prompt], greedy(1, prompt_logprobs=0))[0]
            error = worst(prompt_losses(read), losses[: len(prompt) - 1])
            assert error < LOSS_TOLERANCE


def test_a_long_trained_length_is_proved(tmp_path: Path) -> None:
    """Whose own float32 angles are coarse at its far end."""
    make_llama(tmp_path, max_position_embeddings=1 << 17)
    ids = [256, *(7919 * i * i % 256 for i in range(1, 150))]
    losses = []
    for sinks in ((4, 60), (4, 1000), None):
        with engine(tmp_path, sinks, max_model_len=2048) as llm:
            read = generate(llm, [ids], greedy(1, prompt_logprobs=0))[0]
            losses.append(prompt_losses(read))
    evicting, resident, stock = losses
    assert worst(resident, stock) < 1e-4
    assert worst(evicting, stock) > 0.1
