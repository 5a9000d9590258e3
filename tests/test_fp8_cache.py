# SPDX-License-Identifier: Apache-2.0
"""An 8-bit KV cache on the CPU, by the engine: what it loses is the rounding alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import LLM

from sink_paged.attention.layer import CacheWriter
from tests.attention_batches import E4M3, E5M2, quantise
from tests.engines import (
    GOLDEN,
    continuations,
    core,
    engine,
    forget,
    generate,
    greedy,
    prompt_losses,
    worst,
)
from tests.families import MIXED, make_model

SINKS = (4, 60)
BLOCK_SIZE = 16
IDS: list[int] = json.loads((GOLDEN / "golden.json").read_text())["ids"][:250]
READ = greedy(1, prompt_logprobs=0)
TOLERANCE = 1e-4
SCALES = (2.0**-9, 2.0**-10)  # so small that large keys and values are cut off

Writes = list[tuple[Tensor, Tensor]]  # keys and values of every write, not yet rounded


def read(llm: LLM) -> list[float]:
    forget(llm)
    return prompt_losses(generate(llm, [IDS], READ)[0])


def read_and_record(llm: LLM) -> tuple[list[float], Writes]:
    """Losses of `IDS`, and what was written to the cache meanwhile."""
    write, writes = CacheWriter.write, []

    def record(self: CacheWriter, key: Tensor, value: Tensor, *args: Tensor) -> None:
        writes.append((key.clone(), value.clone()))
        write(self, key, value, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", record)
        return read(llm), writes


def read_rounded(
    llm: LLM,
    writes: Writes,
    dtype: torch.dtype,
    scales: tuple[float, float] = (1.0, 1.0),
) -> list[float]:
    """Losses of `IDS` where a cache of float32 has what one of 8 bits stands for.

    The keys and values are those of `writes`: of its own, which are summed in another
    order, some would fall on the other side of a rounding.
    """
    write, left = CacheWriter.write, iter(writes)

    def replay(self: CacheWriter, key: Tensor, value: Tensor, *args: Tensor) -> None:
        rounded = [
            quantise(x, scale, dtype).to(x.dtype) * scale
            for x, scale in zip(next(left), scales, strict=True)
        ]
        assert rounded[0].shape == key.shape and rounded[1].shape == value.shape
        write(self, *rounded, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", replay)
        losses = read(llm)
    assert next(left, None) is None
    return losses


def add_scales(model: Path) -> None:
    """Give a checkpoint the factors that calibration leaves in one."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if name.endswith("self_attn.k_proj.weight")]
    for name in names:
        for which, scale in zip("kv", SCALES, strict=True):
            scale_name = name.replace("k_proj.weight", f"{which}_scale")
            tensors[scale_name] = torch.tensor([scale])
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": scheme | {"dynamic": False},
    }
    (model / "config.json").write_text(json.dumps(config))


def test_scales_of_a_checkpoint(tmp_path: Path) -> None:
    """Factors of keys and values that a checkpoint brings are taken."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    add_scales(tmp_path)
    with engine(tmp_path, SINKS, kv_cache_dtype="fp8") as llm:
        held, writes = read_and_record(llm)
    with engine(GOLDEN, SINKS) as llm:
        assert worst(held, read_rounded(llm, writes, E4M3, SCALES)) < TOLERANCE
        assert worst(held, read_rounded(llm, writes, E4M3)) > 0.5


def test_sliding_layers(tmp_path: Path) -> None:
    """Beside global ones, in E5M2."""
    make_model(MIXED, tmp_path)
    with engine(tmp_path, SINKS, kv_cache_dtype="fp8_e5m2") as llm:
        held, writes = read_and_record(llm)
    with engine(tmp_path, SINKS) as llm:
        assert worst(held, read_rounded(llm, writes, E5M2)) < TOLERANCE


def test_losses_are_those_of_rounded_keys_and_values() -> None:
    """Far past the window, and not those of keys and values as they were."""
    plain = json.loads((GOLDEN / "golden.json").read_text())["res"]["4+60"]["nll"]
    with engine(GOLDEN, SINKS, kv_cache_dtype="fp8") as llm:
        held, writes = read_and_record(llm)
    with engine(GOLDEN, SINKS) as llm:
        assert worst(held, read_rounded(llm, writes, E4M3)) < TOLERANCE
    assert worst(held, plain[: len(held)]) > 0.5


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(GOLDEN, SINKS, block_size=BLOCK_SIZE, kv_cache_dtype="fp8") as llm:
        yield llm


def test_chunks_and_prefix_cache_hits(llm: LLM) -> None:
    """The same greedy tokens, read in one chunk, in many, or found in the cache."""
    forget(llm)
    cold = generate(llm, [IDS], greedy(40))[0]
    hit = generate(llm, [IDS], greedy(40))[0]
    assert not cold.num_cached_tokens
    assert hit.num_cached_tokens == (len(IDS) - 1) // BLOCK_SIZE * BLOCK_SIZE
    tokens = list(cold.outputs[0].token_ids)
    assert list(hit.outputs[0].token_ids) == tokens
    forget(llm)
    core(llm).scheduler.scheduler_config.long_prefill_token_threshold = 37
    assert continuations(llm, [IDS, IDS[:70]], 40)[0] == tokens


def test_a_quarter_of_the_memory(llm: LLM) -> None:
    """Of what a float32 cache takes: four times the blocks."""
    config = core(llm).scheduler.kv_cache_config
    layers, heads, head_size = 3, 4, 32
    page = BLOCK_SIZE * heads * 2 * head_size
    assert config.kv_cache_groups[0].kv_cache_spec.page_size_bytes == page
    assert config.num_blocks == (1 << 28) // (layers * page)
