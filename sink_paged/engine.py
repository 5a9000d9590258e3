# SPDX-License-Identifier: Apache-2.0
"""Turns a vLLM engine config into that of a streaming engine, or refuses.

The whole switch is here: the resolved cache config goes into ``additional_config``,
``max_model_len`` becomes the longest text of a stream, and the attention backend and
the worker are the extension's. Everything else reads those.
"""

from __future__ import annotations

import os
from typing import Any

import vllm
from packaging.version import Version
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from sink_paged.config import MAX_STREAM_TOKENS, SinkConfig, StreamConfig
from sink_paged.platforms import (
    KV_CACHE_DTYPES,
    Platform,
    find_platform,
    lacks_instructions,
)

TESTED_VLLM = ("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
SPECULATIVE_METHODS = ("ngram", "ngram_gpu", "draft_model")
"""Legal values of ``method`` in ``--speculative-config``."""
UNTESTED_VARIABLE = "SINK_PAGED_ALLOW_UNTESTED_VLLM"
"""Set to 1 in the environment, any vLLM is tried."""
DETOURS = (
    "this CPU has no instructions for %s: it reads prompts several times as fast with "
    "--dtype float32, whose weights and KV cache take twice the memory"
)

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers only


class UnsupportedSettingError(ValueError):
    """A vLLM setting or version that sink eviction does not work with."""


def check_vllm_version() -> None:
    """Refuse a vLLM that the extension was not tested with, or warn, where told to.

    Raises:
        UnsupportedSettingError: naming the version and the tested ones.
    """
    if Version(vllm.__version__).public in TESTED_VLLM:
        return
    tested = ", ".join(TESTED_VLLM)
    if os.environ.get(UNTESTED_VARIABLE) == "1":
        logger.warning_once(
            "sink_paged has not been tested with vLLM %s (but with %s): where its "
            "internals have changed, sink eviction may fail or write wrong tokens",
            vllm.__version__,
            tested,
        )
        return
    raise UnsupportedSettingError(
        f"sink eviction does not support vLLM {vllm.__version__}, which it was not "
        f"tested with: install one of {tested}. {UNTESTED_VARIABLE}=1 in the "
        "environment tries it all the same; where vLLM's internals have changed, it "
        "may fail or write wrong tokens"
    )


def enable_sink_eviction(vllm_config: VllmConfig, config: SinkConfig) -> None:
    """Make ``vllm_config`` a streaming engine's, in place.

    Raises:
        ValueError: naming the setting that is wrong or not supported.
    """
    platform = find_platform()
    if platform is None:
        raise UnsupportedSettingError(
            f"sink eviction does not support platform {current_platform.device_name}: "
            "it has attention kernels for CPU and CUDA"
        )
    _check_settings(vllm_config, platform)
    model_config = vllm_config.model_config
    if lacks_instructions(model_config.dtype):
        logger.warning_once(DETOURS, str(model_config.dtype).removeprefix("torch."))
    # vLLM lets --max-model-len exceed the trained length where an environment variable
    # allows it; distances inside the cache must not.
    trained = model_config.get_and_verify_max_len(None)
    resident = min(model_config.max_model_len, trained)
    if _rope_type(model_config.hf_text_config) == "longrope" and resident < (
        model_config.max_model_len
    ):
        raise UnsupportedSettingError(
            "sink eviction does not support longrope frequencies beyond their switch: "
            f"set --max-model-len to {trained} at most"
        )
    window = config.resolve(resident, vllm_config.cache_config.sliding_window)
    _check_sink_token(vllm_config, config.sink_token_id)
    stream = StreamConfig(window, resident, config.sink_token_id, config.positions)
    vllm_config.additional_config = stream.store(vllm_config.additional_config)
    model_config.max_model_len = MAX_STREAM_TOKENS
    scheduler = vllm_config.scheduler_config
    if not scheduler.long_prefill_token_threshold:
        # Prompts have no end here: one must not take all steps from the others.
        scheduler.long_prefill_token_threshold = scheduler.max_num_batched_tokens // 4
    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    if vllm_config.speculative_config is not None:
        vllm_config.speculative_config.attention_backend = AttentionBackendEnum.CUSTOM
        _settle_scheduling(vllm_config)
    vllm_config.parallel_config.worker_cls = platform.worker


def _check_settings(vllm_config: VllmConfig, platform: Platform) -> None:
    """Refuse what the extension does not get right, by the setting's name."""
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    attention = vllm_config.attention_config
    text_config = model.hf_text_config
    name = model.architecture
    refused: dict[str, Any] = {
        "pooling models: they read their text once": model.runner_type != "generate",
        f"encoder-decoder models, as {name} is": model.is_encoder_decoder,
        f"recurrent (Mamba or linear attention) layers, as {name} has": (
            model.is_hybrid or model.is_attention_free
        ),
        f"multi-head latent attention (MLA), as the layers of {name} have": (
            model.use_mla
        ),
        "M-RoPE positions (multimodal models)": model.uses_mrope,
        "attention whose scale depends on the text position": bool(
            getattr(text_config, "attn_temperature_tuning", False)
            or "llama_4_scaling_beta"
            in (getattr(text_config, "rope_parameters", {}) or {})
        ),
        "attention in chunks of the text": model.attention_chunk_size is not None,
        "rotary frequencies that change with the length (rope_type dynamic)": (
            _rope_type(text_config) == "dynamic"
        ),
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--kv-transfer-config and --kv-offloading-size": vllm_config.kv_transfer_config
        is not None,
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size and --prefill-context-parallel-size above 1": (
            parallel.decode_context_parallel_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "--no-enable-chunked-prefill: texts are longer than any batch": (
            not vllm_config.scheduler_config.enable_chunked_prefill
        ),
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype
        not in KV_CACHE_DTYPES,
        f"--block-size {cache.block_size}: it must be a multiple of 16": (
            cache.block_size % 16 != 0
        ),
        f"--attention-backend {getattr(attention.backend, 'name', '')}: sink eviction "
        "brings its own": attention.backend is not None,
        f"--worker-cls {parallel.worker_cls}: sink eviction brings its own": (
            parallel.worker_cls != platform.stock_worker
        ),
        "--enable-dbo and --ubatch-size: microbatches share the rotations of a step": (
            getattr(parallel, "use_ubatching", False)
        ),
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "VLLM_USE_RUST_FRONTEND: it would not cap max_tokens": bool(
            envs.VLLM_USE_RUST_FRONTEND
        ),
        "another plugin's CUSTOM attention backend": (
            AttentionBackendEnum.CUSTOM.get_path() != platform.backend
        ),
    }
    for setting, applies in refused.items():
        if applies:
            raise UnsupportedSettingError(f"sink eviction does not support {setting}")
    _check_speculation(vllm_config)
    _check_runner_v2(vllm_config)


def _check_speculation(vllm_config: VllmConfig) -> None:
    """Refuse drafters that have not been taught what a stream keeps.

    vLLM itself refuses those that its model runner does not have.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    draft = speculative.draft_model_config
    resident = vllm_config.model_config.max_model_len
    method = speculative.method
    drafts = method == "draft_model"
    refused = {
        f'method "{method}" (but {", ".join(SPECULATIVE_METHODS)})': (
            method not in SPECULATIVE_METHODS
        ),
        'method "ngram_gpu" on model runner V1: use "ngram"': (
            not vllm_config.use_v2_model_runner and method == "ngram_gpu"
        ),
        "parallel_drafting": speculative.parallel_drafting,
        "enable_adaptive_verification": getattr(
            speculative, "enable_adaptive_verification", False
        ),
        "a kv_cache_dtype of its own": speculative.kv_cache_dtype is not None,
        "use_heterogeneous_vocab": getattr(
            speculative, "use_heterogeneous_vocab", False
        ),
        f"a draft model of at most {draft and draft.max_model_len} tokens: set "
        "--max-model-len to that": drafts and draft.max_model_len < resident,
    }
    for setting, applies in refused.items():
        if applies:
            raise UnsupportedSettingError(
                "sink eviction does not support --speculative-config with " + setting
            )


def _settle_scheduling(vllm_config: VllmConfig) -> None:
    """Turn async scheduling off where drafts on model runner V1 would meet it.

    vLLM turns it on by default, and makes its scheduler later. There V1 runs a step
    before it knows which drafts of the step before hold, and corrects what it keeps of
    a request afterwards; that has not been taught streams.
    """
    scheduler = vllm_config.scheduler_config
    if scheduler.async_scheduling and not vllm_config.use_v2_model_runner:
        logger.warning_once(
            "Sink eviction turns async scheduling off for speculative decoding on "
            "model runner V1"
        )
        scheduler.async_scheduling = False


def _check_runner_v2(vllm_config: VllmConfig) -> None:
    """Refuse what looks back at any token of a text, where the text is not kept."""
    if not vllm_config.use_v2_model_runner:
        return
    refused = {
        "without a Triton that runs here": not HAS_TRITON,
        "with watermarks": getattr(vllm_config, "watermark_config", None) is not None,
        "with --enable-trace-replay": vllm_config.model_config.enable_trace_replay,
        "with custom logits processors": bool(
            vllm_config.model_config.logits_processors
        ),
    }
    for setting, applies in refused.items():
        if applies:
            raise UnsupportedSettingError(
                f"sink eviction does not support model runner V2 {setting}; "
                "VLLM_USE_V2_MODEL_RUNNER=0 takes the other runner"
            )


def _check_sink_token(vllm_config: VllmConfig, token: int | None) -> None:
    """Refuse a dedicated sink token that the model or the engine cannot take."""
    if token is None:
        return
    model = vllm_config.model_config
    # vLLM moved the setting from the model's config to one of its own.
    outputs = getattr(vllm_config, "aux_output_config", None) or model
    vocabulary = model.get_vocab_size()
    if token >= vocabulary:
        raise UnsupportedSettingError(
            f"sink_token_id={token} is not in the model's vocabulary: it must be in "
            f"[0, {vocabulary - 1}]"
        )
    refused = {
        "multimodal models": model.is_multimodal_model,
        "--enable-return-routed-experts": getattr(
            outputs, "enable_return_routed_experts", False
        ),
    }
    for setting, applies in refused.items():
        if applies:
            raise UnsupportedSettingError(
                f"sink_token_id does not work with {setting}: what is told by prompt "
                "position would be one off"
            )


def _rope_type(text_config: Any) -> str:
    """``rope_type`` of a Hugging Face config, by its new or its old name."""
    for name in ("rope_parameters", "rope_scaling"):
        scaling = getattr(text_config, name, None) or {}
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind:
            return str(kind)
    return "default"
