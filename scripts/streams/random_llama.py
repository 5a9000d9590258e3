# SPDX-License-Identifier: Apache-2.0
"""Llamas of random weights: speed does not depend on what the weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "random-29m": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "random-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "random-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""By name; the last two have the shapes of Llama 3.2 1B and Llama 3.1 8B."""


def write_random_llama(
    folder: Path, max_position: int, dtype: str = "float32", **shape: Any
) -> None:
    """Write a checkpoint without a tokenizer, the same one every time on a device.

    Args:
        folder: where to.
        max_position: what the config says was the trained length, in tokens.
        dtype: of the weights.
        shape: settings of ``transformers.LlamaConfig``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=max_position, initializer_range=0.1, **shape
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
