# SPDX-License-Identifier: Apache-2.0
"""Rotary models through the real engine, against the token-by-token oracle."""

from pathlib import Path

import pytest

from tests.against_oracle import check_family

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
    "Phi-3 (longrope, short)": SHORT,
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
    check_family(family, tmp_path, (4, 60), GREEDY_TOKENS[family])
