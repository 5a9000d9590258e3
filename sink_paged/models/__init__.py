# SPDX-License-Identifier: Apache-2.0
"""Models that vLLM no longer carries."""

from __future__ import annotations

MPT = "sink_paged.models.mpt:MPTForCausalLM"
MPT_ARCHITECTURES = ("MPTForCausalLM", "MptForCausalLM")
"""The names in original and in Hugging Face checkpoints."""


def register() -> None:
    """Register MPT with vLLM, lazily, where vLLM does not have it.

    With it its config class: the one in Transformers refuses published checkpoints
    (``clip_qkv: 6``, grouped-query attention).
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from sink_paged.models.mpt_config import MptConfig

    present = ModelRegistry.get_supported_archs()
    missing = [name for name in MPT_ARCHITECTURES if name not in present]
    for architecture in missing:
        ModelRegistry.register_model(architecture, MPT)
    if missing:
        AutoConfig.register(MptConfig.model_type, MptConfig, exist_ok=True)
