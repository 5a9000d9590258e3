# SPDX-License-Identifier: Apache-2.0
"""What one measurement is to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Streams that begin at once and write until their texts have a given length.

    All lengths are in tokens.

    Attributes:
        peer: name of a module in ``streams.peers``.
        model: folder of the checkpoint, or its name.
        streams: streams that write side by side.
        window: KV tokens a stream keeps beside the query's own, the sinks included:
            the paper's cache size, ``S + R``.
        sink_tokens: ``S``.
        prompt_tokens: prompt of each stream, random.
        text_tokens: length at which a text ends, prompt and output.
        pool_tokens: size of the KV pool; 0 for what the streams need.
        seconds: time from the first token of all streams after which the peers that
            cost the same at any length (recomputation, Hugging Face) may stop; 0 lets
            them finish.
        dtype: of weights and activations.
        eager: no ``torch.compile``.
        block_size: tokens in a KV block.
        max_num_batched_tokens: most tokens in a step of an engine.
        steps_in_flight: of an engine of vLLM, which schedules a GPU's next step while
            one runs.
        seed: of the prompts.
        kv_cache_dtype: as vLLM names it; ``auto`` is ``dtype``.
        scratch: folder for what a peer makes of the checkpoint.
    """

    peer: str
    model: str
    streams: int
    window: int
    sink_tokens: int
    prompt_tokens: int
    text_tokens: int
    pool_tokens: int = 0
    seconds: float = 20.0
    dtype: str = "float32"
    eager: bool = False
    block_size: int = 32
    max_num_batched_tokens: int = 2048
    steps_in_flight: int = 1
    seed: int = 0
    kv_cache_dtype: str = "auto"
    scratch: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """What ``to_json`` wrote."""
        return cls(**json.loads(line))

    @property
    def output_tokens(self) -> int:
        """Tokens each stream is to write."""
        return self.text_tokens - self.prompt_tokens

    def prompts(self, purpose: str = "timed") -> list[list[int]]:
        """Random token ids, ``prompt_tokens`` a stream; others for another purpose."""
        rng = np.random.default_rng([self.seed, *purpose.encode()])
        shape = (self.streams, self.prompt_tokens)
        ids: list[list[int]] = rng.integers(self.vocab_size, size=shape).tolist()
        return ids

    @property
    def vocab_size(self) -> int:
        """Token ids of the model."""
        return int(self.config["vocab_size"])

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that keys and values of one token take in all layers."""
        config = self.config
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        dtype = self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        width = 1 if dtype.startswith("fp8") else 4 if dtype == "float32" else 2
        kv_heads = config.get("num_key_value_heads") or heads
        return 2 * int(config["num_hidden_layers"] * kv_heads * size * width)

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's ``config.json``; of its text model where it has several."""
        whole = read_config(self.model)
        text: dict[str, Any] = whole.get("text_config", whole)
        return text


def read_config(model: str) -> dict[str, Any]:
    """``config.json`` of a folder or of a model of the hub's cache.

    Raises:
        FileNotFoundError: naming the model.
    """
    path = Path(model, "config.json")
    if not path.exists():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            raise FileNotFoundError(
                f"{model} is neither a folder with a config.json nor a model in the "
                "local cache of the Hugging Face hub"
            )
        path = Path(cached)
    config: dict[str, Any] = json.loads(path.read_text())
    return config
