# SPDX-License-Identifier: Apache-2.0
"""MPT, a model of our own: both checkpoint layouts, against oracle and Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MptForCausalLM
from transformers import MptConfig as HuggingFaceConfig
from vllm import ModelRegistry

from sink_paged import models
from sink_paged.models.mpt_config import MptConfig
from tests.engines import engine, worst
from tests.oracle import stream_losses
from tests.oracle_mpt import MptOracle
from tests.stream_checks import (
    IDS,
    LOSS_TOLERANCE,
    SHORT,
    SINKS,
    TRAINED,
    check_stream,
    dense_losses,
    stock_losses,
)
from tests.support import record

ORIGINAL: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "model_type": "mpt",
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "expansion_ratio": 2,
    "max_seq_len": TRAINED,
    "vocab_size": 320,
    "emb_pdrop": 0,
    "resid_pdrop": 0,
    "embedding_fraction": 1.0,
    "init_config": {"name": "kaiming_normal_"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "torch_dtype": "float32",
    "use_cache": False,
    "verbose": 0,
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
}


def original(changes: dict[str, Any], attention: dict[str, Any]) -> dict[str, Any]:
    """A MosaicML ``config.json``."""
    attn_config = ORIGINAL["attn_config"] | attention
    return ORIGINAL | changes | {"attn_config": attn_config}


EVERY_OPTION = original(
    {"no_bias": False, "logit_scale": 0.7},
    {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 2,
        "alibi_bias_max": 16,
        "clip_qkv": 2,
        "qk_ln": True,
        "softmax_scale": 0.1,
    },
)
MULTI_QUERY = original(
    {"n_heads": 6, "d_model": 192}, {"attn_type": "multiquery_attention", "clip_qkv": 1}
)


def write_original(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Random weights by MosaicML's names, as its code saved them."""
    torch.manual_seed(0)
    width, heads = config["d_model"], config["n_heads"]
    kind = config["attn_config"]["attn_type"]
    kv_heads = {"multiquery_attention": 1, "multihead_attention": heads}.get(
        kind, config["attn_config"].get("kv_n_heads")
    )
    kv_size = kv_heads * width // heads
    inner = config["expansion_ratio"] * width
    linears = {
        "attn.Wqkv": (width + 2 * kv_size, width),
        "attn.out_proj": (width, width),
        "ffn.up_proj": (inner, width),
        "ffn.down_proj": (width, inner),
    }
    norms = {"norm_1": width, "norm_2": width}
    if config["attn_config"]["qk_ln"]:
        norms |= {"attn.q_ln": width, "attn.k_ln": kv_size}
    weights = {"wte.weight": torch.randn(config["vocab_size"], width) * 0.3}
    shapes: dict[str, Any] = {"norm_f": width}
    for layer in range(config["n_layers"]):
        for name, shape in (linears | norms).items():
            shapes[f"blocks.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        norm = isinstance(shape, int)
        size = shape if norm else shape[0]
        weights[f"{name}.weight"] = (
            1 + torch.randn(shape) * 0.1 if norm else torch.randn(shape) * 0.15
        )
        if not config["no_bias"]:
            weights[f"{name}.bias"] = torch.randn(size) * 0.1
    weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def write_hugging_face(folder: Path) -> MptForCausalLM:
    """As Hugging Face's class saves it; a norm's weight is what a fresh one is not."""
    torch.manual_seed(0)
    config = HuggingFaceConfig(
        d_model=128,
        n_heads=4,
        n_layers=2,
        vocab_size=320,
        max_seq_len=TRAINED,
        initializer_range=0.15,
        attn_config={"clip_qkv": 1.0},
    )
    model = MptForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.family
@pytest.mark.parametrize("family", ["MPT"])
def test_hugging_face_layout(family: str, tmp_path: Path) -> None:
    """Within the window the losses are those of Hugging Face's own class."""
    model = write_hugging_face(tmp_path)
    config = model.config.to_dict()
    weights = model.state_dict()
    assert abs(weights["transformer.blocks.0.attn.Wqkv.weight"]).max() > 0.3
    checked = check_stream(tmp_path, lambda: MptOracle(weights, config, *SINKS))
    assert worst(checked.short, dense_losses(model, SHORT)) < 1e-4
    # Hugging Face goes on working with the config class that vLLM was given.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.config, MptConfig)
    assert dense_losses(loaded, SHORT) == dense_losses(model, SHORT)
    wide = MptOracle(weights, config, 4, TRAINED)
    ids = IDS[: TRAINED // 2]
    assert worst(stream_losses(wide, ids), dense_losses(model, ids)) < 1e-4
    record(family, "ALiBi", checked.error)


@pytest.mark.parametrize(
    "config", [EVERY_OPTION, MULTI_QUERY], ids=["every-option", "multi-query"]
)
def test_original_layout(config: dict[str, Any], tmp_path: Path) -> None:
    """Within the window the model has the same losses on vLLM's own attention."""
    weights = write_original(config, tmp_path)
    checked = check_stream(tmp_path, lambda: MptOracle(weights, config, *SINKS))
    assert worst(checked.short, stock_losses(tmp_path)) < 1e-4


OPTIONS = {
    "alibi_bias_max": 8,
    "clip_qkv": None,
    "qk_ln": False,
    "softmax_scale": None,
    "logit_scale": None,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_shows(option: str, tmp_path: Path) -> None:
    """Without any one of them the losses differ, so the test above sees each."""
    weights = write_original(EVERY_OPTION, tmp_path)
    if option == "logit_scale":
        without = EVERY_OPTION | {option: None}
    else:
        settings = EVERY_OPTION["attn_config"] | {option: OPTIONS[option]}
        without = EVERY_OPTION | {"attn_config": settings}
    ids = IDS[:100]
    losses = [
        stream_losses(MptOracle(weights, config, *SINKS), ids)
        for config in (EVERY_OPTION, without)
    ]
    assert worst(*losses) > 10 * LOSS_TOLERANCE


def test_biases_are_not_made_up(tmp_path: Path) -> None:
    write_original(ORIGINAL, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"no_bias": False}))
    with (
        pytest.raises(ValueError, match="not initialized from checkpoint"),
        engine(tmp_path, SINKS),
    ):
        pass


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    write_original(ORIGINAL, tmp_path)
    config = original({}, {"alibi": False})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ValueError, match="MPT is not supported.*learned absolute"),
        engine(tmp_path, SINKS),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "attention", "reason"),
    [
        ({}, {"rope": True, "alibi": False}, "rotary"),
        ({}, {"prefix_lm": True}, "prefix language model"),
        ({}, {"attn_type": "other"}, "attn_type is other"),
        ({}, {"sliding_window_size": 128}, "sliding window"),
        ({}, {"qk_gn": True}, "normalises each head"),
        ({}, {"attn_logit_softcapping": 30.0}, "caps"),
        ({"norm_type": "rmsnorm"}, {}, "norm_type is rmsnorm"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, {}, "ffn_config"),
        ({"ffn_config": {"ffn_act_fn": {"name": "relu"}}}, {}, "ffn_config"),
        ({"block_overrides": {"order": []}}, {}, "layers differ"),
        ({"residual_modification": "layer"}, {}, "residuals"),
    ],
)
def test_other_variants_are_refused(
    changes: dict[str, Any], attention: dict[str, Any], reason: str
) -> None:
    settings = original(changes, attention)
    assert reason in (MptConfig(**settings).unsupported() or "")


def test_published_configs_are_read() -> None:
    story_writer = MptConfig(**original({}, {"clip_qkv": 6}))
    assert story_writer.unsupported() is None
    assert story_writer.logits_factor == 1.0
    scaled = MptConfig(**original({"logit_scale": "inv_sqrt_d_model"}, {}))
    assert scaled.logits_factor == 128**-0.5
    # Hugging Face leaves out of config.json what is its default.
    bare = MptConfig(architectures=["MptForCausalLM"])
    assert bare.no_bias
    assert bare.unsupported() is None
    assert not MptConfig(architectures=["MPTForCausalLM"]).no_bias


def test_vllms_own_mpt_would_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    for name in models.MPT_ARCHITECTURES:
        monkeypatch.setitem(ModelRegistry.models, name, theirs)
    models.register()
    for name in models.MPT_ARCHITECTURES:
        assert ModelRegistry.models[name] is theirs
