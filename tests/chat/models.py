# SPDX-License-Identifier: Apache-2.0
"""The bundled model as a chat model, an adapter for it, and both merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.servers import MODEL

MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens of vLLM's reasoning and tool parsers; the model has rows for them."""
MARKUP_IDS = range(259, 259 + len(MARKUP))
RANK, SCALE = 4, 2.0
WEIGHTS = "model.safetensors"


def make_chat_model(folder: Path) -> Path:
    """The bundled model, with ``MARKUP`` in its tokenizer."""
    shutil.copytree(MODEL, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = tokenizer["added_tokens"]
    assert MARKUP_IDS[0] == 1 + max(token["id"] for token in known)
    known += [
        {**known[0], "id": token, "content": text, "special": False}
        for token, text in zip(MARKUP_IDS, MARKUP, strict=True)
    ]
    file.write_text(json.dumps(tokenizer))
    return folder


def make_adapter(folder: Path) -> Path:
    """A random LoRA adapter of all linear layers of the bundled model."""
    weights = load_file(MODEL / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    adapter, modules = {}, set()
    for name, weight in weights.items():
        path, _, last = name.removesuffix(".weight").rpartition(".")
        if not last.endswith("_proj"):
            continue
        rows, columns = weight.shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) * weight.std()
        stem = f"base_model.model.{path}.{last}"
        adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        modules.add(last)
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": SCALE * RANK,
        "target_modules": sorted(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(adapter: Path, folder: Path) -> Path:
    """The bundled model with the adapter's products added to its weights."""
    parts = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(MODEL / WEIGHTS)

    def merged(name: str, weight: Tensor) -> Tensor:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in parts:
            return weight
        product = parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"]
        return weight + SCALE * product

    shutil.copytree(MODEL, folder)
    save_file(
        {name: merged(name, weight) for name, weight in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    return folder
