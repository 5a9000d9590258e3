# SPDX-License-Identifier: Apache-2.0
"""Real engines for the tests: in this process, so that tests can look inside."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "llama_mha"
NEAR_TIE = 3e-3
"""Gap of the two best log-probabilities below which float32 may choose either."""


def vllm_since(version: str) -> bool:
    """Whether this vLLM is ``version`` or a later one."""
    return Version(vllm.__version__) >= Version(version)


SHARED_NUMA_NODE = ("VLLM_CPU_SIM_MULTI_NUMA", "0")
"""Environment in which a second engine's worker shares the machine's only NUMA node.

Since vLLM 0.33 it asks for the second one, and fails where there is none.
"""
FIRST_V2 = {"ngram": "0.32.0", "draft_model": "0.31.0"}
"""The first vLLM whose model runner V2 has a method of speculation."""


def has_v2_drafter(method: str) -> bool:
    """Whether this vLLM's model runner V2 drafts by ``method``."""
    return vllm_since(FIRST_V2[method])


@contextmanager
def engine(model: Path, sinks: tuple[int, int] | None, **options: Any) -> Iterator[LLM]:
    """A float32 engine; ``sinks`` is the cache config ``(S, R)``, None for stock."""
    if sinks is not None:
        settings = {"sink_tokens": sinks[0], "window_tokens": sinks[1]}
        options["additional_config"] = {"sink_paged": settings}
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 16,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 28,
    } | options
    try:
        llm = LLM(str(model), **options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def make_llama(folder: Path, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Write a tiny random Llama with pronounced attention into ``folder``."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "rope_theta": 10000.0,
        "initializer_range": 0.15,
    }
    config = LlamaConfig(**(settings | changes))
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def generate(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[RequestOutput]:
    """Token prompts in, outputs in the same order."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    """Greedy sampling without an end token."""
    settings = {"temperature": 0, "ignore_eos": True, "detokenize": False} | changes
    return SamplingParams(max_tokens=max_tokens, **settings)


def prompt_losses(output: RequestOutput) -> list[float]:
    """Negative log-likelihoods of the prompt's tokens from the second on."""
    assert output.prompt_logprobs is not None
    ids = output.prompt_token_ids
    return [
        -entry[token].logprob
        for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    ]


def eight_bit_losses(ids: list[int], **options: Any) -> dict[str, list[float]]:
    """Losses of a prompt by our CUDA backend, with three caches.

    What the 8-bit cache stores is checked against torch's rounding; Triton's
    interpreter, which loses a carry into the exponent, may store half of it.

    Returns:
        By cache: ``fp8``, of 8 bits; ``replayed``, in the model's dtype, holding the
        very numbers that the first one stored; ``plain``, in the model's dtype.
    """
    from sink_paged.attention.triton_backend import SinkTritonAttentionImpl

    store = SinkTritonAttentionImpl.do_kv_cache_update
    stored: list[list[Tensor]] = []

    def record(
        self: Any, layer: Any, key: Any, value: Any, cache: Any, slots: Any
    ) -> None:
        store(self, layer, key, value, cache, slots)
        pages, offsets = slots // cache.shape[2], slots % cache.shape[2]
        numbers = cache.transpose(1, 2)[pages, offsets].view(torch.float8_e4m3fn)
        is_written = slots >= 0  # the others are padding
        scales = layer._k_scale, layer._v_scale
        stored.append([])
        for x, part, scale in zip(
            (key, value), numbers.chunk(2, dim=-1), scales, strict=True
        ):
            rounded = (x[: len(slots)] / scale).to(torch.float8_e4m3fn)
            torch.testing.assert_close(
                part.float()[is_written],
                rounded.float()[is_written],
                rtol=0.0 if x.is_cuda else 0.5,
                atol=0.0 if x.is_cuda else 2.0**-9,  # the smallest number
            )
            stored[-1].append(part.to(x.dtype) * scale)

    def replay(self: Any, layer: Any, key: Any, value: Any, *args: Any) -> None:
        store(self, layer, *stored.pop(0), *args)

    losses = {}
    for name, patched, dtype in (
        ("fp8", record, "fp8"),
        ("replayed", replay, "auto"),
        ("plain", store, "auto"),
    ):
        with (
            engine(GOLDEN, (4, 60), kv_cache_dtype=dtype, **options) as llm,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(SinkTritonAttentionImpl, "do_kv_cache_update", patched)
            output = generate(llm, [ids], greedy(1, prompt_logprobs=0))[0]
            losses[name] = prompt_losses(output)
    assert not stored
    return losses


def flash_losses(ids: list[int], **options: Any) -> dict[str, list[float]]:
    """Losses of a prompt by our CUDA backend, on both routes, of heads of 128 dims.

    Returns:
        By route: ``Triton`` and ``FlashAttention``, where that is available.
    """
    from sink_paged.attention import flash

    losses = {}
    options = {"max_num_batched_tokens": 48, "block_size": 16} | options
    # Whole steps, also where vLLM (0.29, 0.30) caps a prompt that no one waits beside.
    options["long_prefill_token_threshold"] = options["max_num_batched_tokens"]
    available = flash.is_available
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        make_llama(Path(folder), head_dim=128, num_attention_heads=2)
        for route, answer in (
            ("Triton", lambda: False),
            ("FlashAttention", available),
        ):
            patch.setattr(flash, "is_available", answer)
            with engine(Path(folder), (4, 60), **options) as llm:
                output = generate(llm, [ids], greedy(4, prompt_logprobs=0))[0]
                losses[route] = prompt_losses(output)
    return losses


def drafted_error(num_tokens: int, **options: Any) -> float:
    """Log-probabilities of a text that was verified, beside those of reading it.

    By our CUDA backend, of heads of 128 dims, with drafts by n-grams.

    Args:
        num_tokens: of the text behind its prompt, which lies past the window.
        options: of the engine.

    Returns:
        The largest difference.
    """
    drafter = {"method": "ngram", "num_speculative_tokens": 3}
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    prompt = [256, *([5, 9, 17, 3] * 20)]
    few = list(range(12))  # a text of few tokens repeats itself
    params = greedy(num_tokens, logprobs=0, allowed_token_ids=few)
    options = {"block_size": 16, "disable_log_stats": False} | options
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder), head_dim=128, num_attention_heads=2)
        options["speculative_config"] = drafter | lookup
        with engine(Path(folder), (4, 60), **options) as llm:
            written = generate(llm, [prompt], params)[0].outputs[0]
            counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
            tokens = list(written.token_ids)
            read = generate(llm, [prompt + tokens], greedy(1, prompt_logprobs=0))[0]
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
    assert written.logprobs is not None
    losses = [
        -entry[token].logprob
        for entry, token in zip(written.logprobs, tokens, strict=True)
    ]
    return worst(losses, prompt_losses(read)[-num_tokens:])


def async_scheduling(patch: pytest.MonkeyPatch) -> None:
    """Let engines on the CPU schedule as on a GPU: vLLM turns it off at the end."""
    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep_asked(cls: type, vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    patch.setattr(platform, "check_and_update_config", classmethod(keep_asked))


def core(llm: LLM) -> Any:
    """The engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def kv_cache_manager(llm: LLM) -> Any:
    """The scheduler's KV-cache manager."""
    return core(llm).scheduler.kv_cache_manager


def pool_is_empty(llm: LLM) -> bool:
    """Whether every block is back in the pool."""
    pool = kv_cache_manager(llm).block_pool
    return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)


def forget(llm: LLM) -> None:
    """Empty the prefix cache."""
    assert pool_is_empty(llm)
    assert llm.reset_prefix_cache()


def continuations(
    llm: LLM, prompts: list[list[int]], count: int = 150
) -> list[list[int]]:
    """The ``count`` greedy tokens that follow each prompt."""
    outputs = generate(llm, prompts, greedy(count))
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_prefix_hits(llm: LLM, ids: list[int], block_size: int) -> list[int]:
    """A text far past the window, again, and in a later turn: as with a cold cache.

    Returns:
        150 greedy tokens behind the text.
    """
    forget(llm)
    cold = generate(llm, [ids], greedy(150))[0]
    assert not cold.num_cached_tokens
    hit = generate(llm, [ids], greedy(150))[0]
    assert hit.num_cached_tokens == (len(ids) - 1) // block_size * block_size
    answer = list(cold.outputs[0].token_ids)
    assert list(hit.outputs[0].token_ids) == answer
    turn = [*ids, *answer, 65, 66]
    warm = generate(llm, [turn], greedy(60))[0]
    assert warm.num_cached_tokens > len(ids) + 100
    forget(llm)
    assert continuations(llm, [turn], 60)[0] == list(warm.outputs[0].token_ids)
    return answer


def worst(left: list[float], right: list[float]) -> float:
    """Largest absolute difference of two equally long lists."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def first_near_tie(gaps: list[float]) -> int:
    """Index of the first step whose choice is not determined in float32."""
    return next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), len(gaps))
