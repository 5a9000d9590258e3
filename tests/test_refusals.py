# SPDX-License-Identifier: Apache-2.0
"""Models that are refused at start-up, with the reason, and the layer where it is one.

Their reasons are recorded for the README. Most need no weights: the config is enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.engines import engine
from tests.families import SIZES, TRAINED, rope
from tests.support import record_refusal

REFUSED = re.compile(r"sink eviction does not support ([^\n]*)")


def config(name: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    """A tiny config of Hugging Face's class ``name``."""
    return lambda: getattr(transformers, name)(**(SIZES | changes))


def longrope(**changes: Any) -> Callable[[], PreTrainedConfig]:
    return config(
        "Phi3Config",
        max_position_embeddings=4 * TRAINED,
        original_max_position_embeddings=TRAINED,
        **rope(
            "longrope",
            short_factor=[1.0] * 16,
            long_factor=[2.0] * 16,
            original_max_position_embeddings=TRAINED,
        ),
    )


BY_CONFIG: dict[str, tuple[str, str, Callable[[], PreTrainedConfig], dict[str, Any]]]
BY_CONFIG = {
    "DeepSeek V2, V3": (
        "rotary in a latent space (MLA)",
        r"multi-head latent attention \(MLA\), as the layers of DeepseekV2ForCausalLM",
        config(
            "DeepseekV2Config",
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
        ),
        {},
    ),
    "Mamba": (
        "recurrent",
        r"recurrent \(Mamba or linear attention\) layers, as MambaForCausalLM has",
        lambda: transformers.MambaConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=1, state_size=8
        ),
        {},
    ),
    "Falcon-H1": (
        "recurrent layers beside attention",
        r"recurrent \(Mamba or linear attention\) layers, as FalconH1ForCausalLM has",
        config("FalconH1Config", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
        {},
    ),
    "Whisper": (
        "learned absolute, encoder-decoder",
        "encoder-decoder models, as WhisperForConditionalGeneration is",
        lambda: transformers.WhisperConfig(
            d_model=64, encoder_layers=1, decoder_layers=1, vocab_size=320
        ),
        {},
    ),
    "any with M-RoPE (Qwen2-VL)": (
        "M-RoPE",
        r"M-RoPE positions \(multimodal models\)",
        config("LlamaConfig", **rope("default", mrope_section=[4, 6, 6])),
        {},
    ),
    "any with dynamic NTK scaling": (
        "rotary, dynamic NTK scaling",
        r"rotary frequencies that change with the length \(rope_type dynamic\)",
        config("LlamaConfig", **rope("dynamic", factor=2.0)),
        {},
    ),
    "any with longrope, beyond its switch": (
        "rotary, longrope",
        f"longrope frequencies beyond their switch: set --max-model-len to {TRAINED}",
        longrope(),
        {"max_model_len": 2 * TRAINED},
    ),
    "Llama 4": (
        "rotary, attention in chunks",
        "attention (in chunks of the text|whose scale depends on the text position)",
        lambda: transformers.Llama4TextConfig(
            **SIZES, num_local_experts=2, attention_chunk_size=64
        ),
        {},
    ),
}
"""Positions, message, config, engine options."""

ARCHITECTURES = {
    "DeepseekV2Config": "DeepseekV2ForCausalLM",
    "MambaConfig": "MambaForCausalLM",
    "FalconH1Config": "FalconH1ForCausalLM",
    "WhisperConfig": "WhisperForConditionalGeneration",
    "LlamaConfig": "LlamaForCausalLM",
    "Phi3Config": "Phi3ForCausalLM",
    "Llama4TextConfig": "Llama4ForCausalLM",
}


@pytest.mark.family
@pytest.mark.parametrize("family", BY_CONFIG)
def test_by_config(family: str, tmp_path: Path) -> None:
    """Before anything of the engine is built."""
    scheme, message, make, options = BY_CONFIG[family]
    made = make()
    made.architectures = [ARCHITECTURES[type(made).__name__]]
    made.save_pretrained(tmp_path)
    arguments = AsyncEngineArgs(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        additional_config={"sink_paged": {}},
        **options,
    )
    with pytest.raises(ValueError, match=f"does not support {message}") as refusal:
        arguments.create_engine_config()
    record_refusal(family, scheme, reason_of(refusal.value))


BY_LAYER: dict[str, tuple[str, str, str, Callable[[], PreTrainedConfig]]]
BY_LAYER = {
    "OPT": (
        "learned absolute",
        r"layer model\.decoder\.layers\.0\.self_attn\.attn \(Attention\)",
        "no rotary embedding",
        config(
            "OPTConfig", ffn_dim=64, word_embed_proj_dim=128, max_position_embeddings=64
        ),
    ),
    "GPT-2": (
        "learned absolute",
        r"layer transformer\.h\.0\.attn\.attn \(Attention\)",
        "no rotary embedding",
        lambda: transformers.GPT2Config(
            vocab_size=320, n_embd=64, n_layer=1, n_head=2, n_positions=64
        ),
    ),
    "HunYuan dense": (
        "rotary, queries and keys normalised behind it",
        r"layer model\.layers\.0\.self_attn\.attn \(Attention\)",
        "otherwise than by the rotation of its rotary module",
        config("HunYuanDenseV1Config"),
    ),
}
"""Positions, layer, reason, config."""


@pytest.mark.family
@pytest.mark.parametrize("family", BY_LAYER)
def test_by_layer(family: str, tmp_path: Path) -> None:
    """Once the model is loaded."""
    scheme, layer, message, make = BY_LAYER[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make()).float()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    model.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=f"{layer}: .*{message}") as refusal,
        engine(tmp_path, (4, 40), max_model_len=64),
    ):
        pass
    record_refusal(family, scheme, reason_of(refusal.value))


def reason_of(error: BaseException) -> str:
    """What a user reads, without the words that all refusals begin with."""
    found = REFUSED.search(str(error))
    assert found is not None
    return found[1].strip().rstrip("'\"")
