# SPDX-License-Identifier: Apache-2.0
"""Falcon and BLOOM through the real engine: multi-query, grouped, ALiBi."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
)

from tests.engines import engine, worst
from tests.oracle import stream_losses
from tests.oracle_alibi import BloomOracle, FalconOracle
from tests.stream_checks import (
    IDS,
    SINKS,
    TRAINED,
    check_stream,
    dense_losses,
    stock_losses,
)
from tests.support import record


class Family(NamedTuple):
    """A model of a family; ``oracle`` makes a fresh stream of it."""

    make: Callable[[], nn.Module]
    oracle: Callable[..., Any]
    scheme: str


def falcon(**changes: Any) -> FalconForCausalLM:
    settings = {
        "vocab_size": 320,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TRAINED,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return FalconForCausalLM(FalconConfig(**(settings | changes)))


def bloom() -> BloomForCausalLM:
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=320,
            hidden_size=192,
            n_layer=2,
            n_head=6,  # not a power of two: slopes of two series
            seq_length=TRAINED,
            initializer_range=0.15,
        )
    )
    # Tied embeddings would else make it write one token for ever.
    nn.init.constant_(model.transformer.word_embeddings_layernorm.weight, 0.1)
    return model


FAMILIES = {
    "Falcon 7B": Family(falcon, FalconOracle, "rotary, one KV head"),
    "Falcon 40B, 180B": Family(
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        FalconOracle,
        "rotary",
    ),
    "Falcon RW": Family(
        lambda: falcon(
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
            tie_word_embeddings=True,
        ),
        FalconOracle,
        "ALiBi",
    ),
    "BLOOM": Family(bloom, BloomOracle, "ALiBi"),
}


def write(model: nn.Module, folder: Path, seed: int = 0) -> nn.Module:
    """Save with biases and norms that are not what a fresh model has."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.float().eval()
    model.save_pretrained(folder)
    return model


def test_oracles_are_hugging_face_within_the_window() -> None:
    """Bias, rotation and layout of the oracles are those of the published models."""
    for name, (make, oracle, _) in FAMILIES.items():
        torch.manual_seed(0)
        model = make().float().eval()
        # vLLM's BLOOM computes the exact GELU, Hugging Face's its approximation.
        options = {"approximate": "tanh"} if name == "BLOOM" else {}
        stream = oracle(model, 4, TRAINED, **options)
        ids = IDS[: TRAINED // 2]
        assert worst(stream_losses(stream, ids), dense_losses(model, ids)) < 1e-4, name


@pytest.mark.family
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    """Losses and 400 greedy tokens of the oracle; stock vLLM's within the window."""
    torch.manual_seed(0)
    make, oracle, scheme = FAMILIES[family]
    model = write(make(), tmp_path)
    checked = check_stream(tmp_path, lambda: oracle(model, *SINKS))
    assert worst(checked.short, stock_losses(tmp_path)) < 1e-4
    record(family, scheme, checked.error)


def test_positions_in_the_text_are_refused(tmp_path: Path) -> None:
    """A bias by distance has no position to count elsewhere; the layer is named."""
    write(bloom(), tmp_path)
    settings = {"sink_tokens": 4, "window_tokens": 40, "positions": "text"}
    options = {"max_model_len": 64, "additional_config": {"sink_paged": settings}}
    with (
        pytest.raises(ValueError, match=r"layer \S+ .*rotary models, it has ALiBi"),
        engine(tmp_path, None, **options),
    ):
        pass
