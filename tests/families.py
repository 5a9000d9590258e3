# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of the model families, written by Hugging Face.

Attention is pronounced (large weights) so that a wrong position or a missing key shows
in the losses. Every family's trained length is 256.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

TRAINED = 256
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": TRAINED,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
THETA = {"rope_type": "default", "rope_theta": 10000.0}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """Changes of a config: rotary positions scaled by ``kind``."""
    return {"rope_parameters": THETA | {"rope_type": kind} | parameters}


def part(factor: float) -> dict[str, Any]:
    """Changes of a config: rotary positions on a part of each head."""
    return {"rope_parameters": THETA | {"partial_rotary_factor": factor}}


LLAMA3 = rope(
    "llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_64 = {"factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SLIDES = "sliding_attention"
ALTERNATING = {
    "layer_types": [SLIDES, "full_attention"],
    "sliding_window": 24,
}
MIXED = "Gemma 3, 3 sliding : 2 global"
"""Unequal groups of layers."""
SLIDING = "Mistral 7B v0.1"
"""Every layer has a window of its own, so the sinks join it."""

FULL = "rotary"
SCALED = "rotary, {} scaling"
PART = "rotary of a part of each head"
SINKS = "sinks + window"
NATIVE = f"rotary; global layers {SINKS}, sliding layers their own window"


class Family(NamedTuple):
    """How a family's tiny model is made.

    Attributes:
        scheme: its positions, in a few words.
        config: name of its config class.
        changes: of the config against ``SIZES``.
    """

    scheme: str
    config: str
    changes: dict[str, Any]


FAMILIES = {
    "Llama (MHA)": Family(FULL, "LlamaConfig", {"num_key_value_heads": 4}),
    "Llama (GQA)": Family(FULL, "LlamaConfig", {}),
    "Llama 3": Family(SCALED.format("llama3"), "LlamaConfig", LLAMA3),
    "Llama, linear scaling": Family(
        SCALED.format("linear"), "LlamaConfig", rope("linear", factor=4.0)
    ),
    "Llama, YaRN": Family(
        SCALED.format("YaRN") + " with its attention factor",
        "LlamaConfig",
        rope("yarn", **YARN_64),
    ),
    "Yi": Family(FULL, "LlamaConfig", rope("default", rope_theta=5e6)),
    "Pythia, GPT-NeoX": Family(
        PART, "GPTNeoXConfig", {"num_key_value_heads": 4} | part(0.25)
    ),
    "Mistral": Family(FULL, "MistralConfig", {"sliding_window": None}),
    SLIDING: Family(
        f"rotary; {SINKS} within the window that every layer has",
        "MistralConfig",
        {"sliding_window": 64},
    ),
    "Qwen2": Family(FULL, "Qwen2Config", {}),
    "Qwen3": Family(FULL, "Qwen3Config", {}),
    "Phi-3": Family(FULL, "Phi3Config", {"sliding_window": None}),
    "Phi-3 long context": Family(
        "rotary, longrope up to its switch",
        "Phi3Config",
        {"sliding_window": None, "max_position_embeddings": 4 * TRAINED}
        | {"original_max_position_embeddings": TRAINED}
        | rope(
            "longrope",
            short_factor=[1.0 + k / 16 for k in range(16)],
            long_factor=[2.0 + k for k in range(16)],
            original_max_position_embeddings=TRAINED,
        ),
    ),
    "Cohere": Family(
        "rotary, interleaved (GPT-J style)",
        "CohereConfig",
        {"logit_scale": 1.0, "tie_word_embeddings": True},
    ),
    "GLM-4-0414": Family(f"{PART}, interleaved", "Glm4Config", part(0.5)),
    "GLM-4-9B": Family(f"{PART}, interleaved", "GlmConfig", part(0.5)),
    "StableLM": Family(PART, "StableLmConfig", part(0.25)),
    "Phi-1, Phi-2": Family(PART, "PhiConfig", part(0.5)),
    "OLMo 2": Family(FULL, "Olmo2Config", {}),
    "StarCoder2": Family(FULL, "Starcoder2Config", {}),
    "Gemma 2": Family(
        NATIVE,
        "Gemma2Config",
        ALTERNATING
        | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0}
        | {"tie_word_embeddings": True},
    ),
    "Gemma 3": Family(
        NATIVE,
        "Gemma3TextConfig",
        ALTERNATING | {"query_pre_attn_scalar": 32, "rope_parameters": GEMMA3},
    ),
    MIXED: Family(
        NATIVE,
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA3,
            "num_hidden_layers": 5,
            "layer_types": [SLIDES, SLIDES, "full_attention", SLIDES, "full_attention"],
            "sliding_window": 40,
        },
    ),
    "gpt-oss": Family(
        NATIVE + ", learned sink logits",
        "GptOssConfig",
        ALTERNATING
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
        | rope("yarn", **YARN_64, beta_fast=32.0, beta_slow=1.0, truncate=False),
    ),
}


def make_config(family: str) -> PreTrainedConfig:
    """The config of a family's tiny model."""
    made = FAMILIES[family]
    config: PreTrainedConfig = getattr(transformers, made.config)(
        **(SIZES | made.changes)
    )
    return config


def make_model(family: str, folder: Path | None = None) -> PreTrainedModel:
    """A tiny random model of ``family``, written into ``folder`` if that is given."""
    model = copy.deepcopy(_random_model(family))
    if folder is not None:
        model.save_pretrained(folder)
    return model


@cache
def _random_model(family: str) -> PreTrainedModel:
    """Made once: an engine's Transformers backend decorates its class in place."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        make_config(family), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("sinks", "bias")):
                weight.normal_(0.0, 1.0 if name.endswith("sinks") else 0.1)
    for module in model.modules():
        module.do_not_compile = True  # asked by the decoration
    return model.float().eval()


def text(length: int) -> list[int]:
    """A fixed text of ``length`` tokens without a period."""
    return [256, *(7919 * i * i % 256 for i in range(1, length))]
