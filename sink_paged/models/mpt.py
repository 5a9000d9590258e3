# SPDX-License-Identifier: Apache-2.0
"""MPT, which vLLM carried until 0.28.

Loads checkpoints of MosaicML's own code and of Hugging Face's ``MptForCausalLM``; their
weights have the same names. Serves them with and without sink eviction.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from sink_paged.models.mpt_config import MptConfig, alibi_slopes


def _norm(config: MptConfig, size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=config.layer_norm_epsilon, bias=not config.no_bias)


class MPTAttention(nn.Module):
    """Attention with ALiBi; the heads are split over the tensor-parallel ranks."""

    def __init__(
        self,
        config: MptConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """Build the layer.

        Raises:
            ValueError: for ``qk_ln``, whose norm spans all heads, on several ranks.
        """
        super().__init__()
        settings = config.attn_config
        ranks = get_tensor_model_parallel_world_size()
        head_size = config.d_model // config.n_heads
        bias = not config.no_bias
        self.Wqkv = QKVParallelLinear(
            config.d_model,
            head_size,
            config.n_heads,
            config.num_key_value_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.Wqkv",
        )
        heads, kv_heads = self.Wqkv.num_heads, self.Wqkv.num_kv_heads
        self.sizes = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
        self.clip_qkv = settings.clip_qkv or None
        self.qk_ln = bool(settings.qk_ln)
        if self.qk_ln:
            if ranks > 1:
                raise ValueError(
                    f"layer {prefix} normalises queries and keys over all heads "
                    "(attn_config.qk_ln): it runs with --tensor-parallel-size 1 only"
                )
            self.q_ln = _norm(config, self.sizes[0])
            self.k_ln = _norm(config, self.sizes[1])
        first = get_tensor_model_parallel_rank() * heads
        slopes = alibi_slopes(config.n_heads, settings.alibi_bias_max)
        self.attn = Attention(
            heads,
            head_size,
            settings.softmax_scale or head_size**-0.5,
            num_kv_heads=kv_heads,
            alibi_slopes=slopes[first : first + heads],
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.out_proj = RowParallelLinear(
            config.d_model,
            config.d_model,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """``[num_tokens, d_model]`` in and out."""
        qkv, _ = self.Wqkv(hidden)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.split(self.sizes, dim=-1)
        if self.qk_ln:
            query, key = self.q_ln(query), self.k_ln(key)
        output, _ = self.out_proj(self.attn(query, key, value))
        return output


class MPTMLP(nn.Module):
    """Feed-forward layers with the exact GELU."""

    def __init__(
        self, config: MptConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        """Build the layer."""
        super().__init__()
        bias = not config.no_bias
        self.up_proj = ColumnParallelLinear(
            config.d_model,
            config.hidden_units,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.up_proj",
        )
        self.act = get_act_fn("gelu")
        self.down_proj = RowParallelLinear(
            config.hidden_units,
            config.d_model,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """``[num_tokens, d_model]`` in and out."""
        inner, _ = self.up_proj(hidden)
        output, _ = self.down_proj(self.act(inner))
        return output


class MPTBlock(nn.Module):
    """One layer: attention, then feed-forward, each behind a norm."""

    def __init__(
        self,
        config: MptConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """Build the layer."""
        super().__init__()
        self.norm_1 = _norm(config, config.d_model)
        self.attn = MPTAttention(config, cache_config, quant_config, f"{prefix}.attn")
        self.norm_2 = _norm(config, config.d_model)
        self.ffn = MPTMLP(config, quant_config, f"{prefix}.ffn")

    def forward(self, hidden: Tensor) -> Tensor:
        """``[num_tokens, d_model]`` in and out."""
        hidden = hidden + self.attn(self.norm_1(hidden))
        return hidden + self.ffn(self.norm_2(hidden))


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0}
)
class MPTModel(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model."""
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            MPTBlock(
                config,
                vllm_config.cache_config,
                vllm_config.quant_config,
                f"{prefix}.blocks.{layer}",
            )
            for layer in range(config.n_layers)
        )
        self.norm_f = _norm(config, config.d_model)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[num_tokens]`` to ``[num_tokens, d_model]``."""
        return self.wte(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[num_tokens, d_model]``; positions are the cache's slots."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden = inputs_embeds
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm_f(hidden)


class MPTForCausalLM(nn.Module):
    """MPT with its output layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model.

        Raises:
            ValueError: for a variant of MPT that is not computed here.
        """
        super().__init__()
        config: MptConfig = vllm_config.model_config.hf_config
        reason = config.unsupported()
        if reason is not None:
            raise ValueError(f"this MPT is not supported: {reason}")
        self.config = config
        self.transformer = MPTModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.d_model,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(
            config.vocab_size, scale=config.logits_factor
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[num_tokens]`` to ``[num_tokens, d_model]``."""
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[num_tokens, d_model]``."""
        return self.transformer(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[num_tokens, d_model]`` to ``[num_tokens, vocab_size]``."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; names that the model does not have are an error."""
        return AutoWeightsLoader(self).load_weights(weights)
