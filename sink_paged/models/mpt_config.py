# SPDX-License-Identifier: Apache-2.0
"""The config of an MPT checkpoint, in MosaicML's and in Hugging Face's layout."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

NORM_TYPES = ("low_precision_layernorm", "layernorm")


class MptAttentionConfig(PretrainedConfig):
    """Settings of an MPT's attention, of any type that a checkpoint gives them."""

    base_config_key = "attn_config"

    def __init__(
        self,
        attn_type: str = "multihead_attention",
        attn_pdrop: float = 0.0,
        clip_qkv: float | None = None,
        softmax_scale: float | None = None,
        prefix_lm: bool = False,
        qk_ln: bool = False,
        alibi: bool = False,
        alibi_bias_max: float = 8,
        kv_n_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        """See the entries of ``attn_config`` in a checkpoint's ``config.json``."""
        self.attn_type = attn_type
        self.attn_pdrop = attn_pdrop
        self.clip_qkv = clip_qkv
        self.softmax_scale = softmax_scale
        self.prefix_lm = prefix_lm
        self.qk_ln = qk_ln
        self.alibi = alibi
        self.alibi_bias_max = alibi_bias_max
        self.kv_n_heads = kv_n_heads
        super().__init__(**kwargs)


class MptConfig(PretrainedConfig):
    """Settings of an MPT model; both layouts have the same names.

    What a checkpoint leaves out has the default of the layout's own code: MosaicML's
    has biases and no ALiBi unless told otherwise, Hugging Face's has it the other way
    round. The class has the name of Transformers' own, which finds its MPT classes by
    it.
    """

    model_type = "mpt"
    sub_configs: ClassVar[dict[str, type]] = {"attn_config": MptAttentionConfig}
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "n_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
    }

    def __init__(
        self,
        d_model: int = 2048,
        n_heads: int = 16,
        n_layers: int = 24,
        expansion_ratio: float = 4,
        max_seq_len: int = 2048,
        vocab_size: int = 50368,
        attn_config: dict[str, Any] | MptAttentionConfig | None = None,
        ffn_config: dict[str, Any] | None = None,
        logit_scale: float | str | None = None,
        no_bias: bool | None = None,
        norm_type: str = "low_precision_layernorm",
        layer_norm_epsilon: float = 1e-5,
        tie_word_embeddings: bool = True,
        use_cache: bool = False,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        """See the attributes of the same names in a checkpoint's ``config.json``."""
        by_hugging_face = "MptForCausalLM" in (kwargs.get("architectures") or ())
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.expansion_ratio = expansion_ratio
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.ffn_config = dict(ffn_config or {})
        self.logit_scale = logit_scale
        self.no_bias = by_hugging_face if no_bias is None else no_bias
        if not isinstance(attn_config, MptAttentionConfig):
            settings = {"alibi": by_hugging_face, **(attn_config or {})}
            attn_config = MptAttentionConfig(**settings)
        self.attn_config = attn_config
        self.norm_type = norm_type
        self.layer_norm_epsilon = layer_norm_epsilon
        # Read by Hugging Face's own MPT classes alone.
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        self.num_key_value_heads = self._kv_heads()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _kv_heads(self) -> int:
        kind = self.attn_config.attn_type
        if kind == "multiquery_attention":
            return 1
        if kind == "grouped_query_attention":
            return self.attn_config.kv_n_heads or self.n_heads
        return self.n_heads

    @property
    def hidden_units(self) -> int:
        """Width of the feed-forward layers."""
        given = self.ffn_config.get("ffn_hidden_size")
        return int(given or self.expansion_ratio * self.d_model)

    @property
    def logits_factor(self) -> float:
        """What the logits are multiplied by."""
        if self.logit_scale is None:
            return 1.0
        if self.logit_scale == "inv_sqrt_d_model":
            return float(self.d_model**-0.5)
        return float(self.logit_scale)

    def unsupported(self) -> str | None:
        """Why ``MPTForCausalLM`` cannot run this model, or None where it can."""
        attention = self.attn_config
        kind = attention.attn_type
        activation = self.ffn_config.get("ffn_act_fn") or {"name": "gelu"}

        def given(name: str) -> Any:
            return getattr(attention, name, None)

        reasons = {
            "it has rotary positions (attn_config.rope)": given("rope"),
            "it has no ALiBi but learned absolute positions (attn_config.alibi is "
            "false)": not attention.alibi,
            "it is a prefix language model (attn_config.prefix_lm), whose prompt "
            "attends in both directions": attention.prefix_lm,
            f"attn_config.attn_type is {kind}": kind
            not in (
                "multihead_attention",
                "multiquery_attention",
                "grouped_query_attention",
            ),
            "it has a sliding window (attn_config.sliding_window_size)": (
                given("sliding_window_size") or -1
            )
            > 0,
            "it normalises each head (attn_config.qk_gn)": given("qk_gn"),
            "it caps its attention logits (attn_config.attn_logit_softcapping)": (
                given("attn_logit_softcapping")
            ),
            f"norm_type is {self.norm_type}": self.norm_type.lower() not in NORM_TYPES,
            f"ffn_config is {self.ffn_config}": self.ffn_config.get(
                "ffn_type", "mptmlp"
            )
            != "mptmlp"
            or activation not in ({"name": "gelu"}, _EXACT_GELU),
            "its layers differ (block_overrides)": getattr(
                self, "block_overrides", None
            ),
            "it rescales its residuals (residual_modification)": getattr(
                self, "residual_modification", None
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


_EXACT_GELU = {"name": "gelu", "approximate": "none"}


def alibi_slopes(num_heads: int, bias_max: float) -> list[float]:
    """ALiBi slopes of an MPT: ``2^(-bias_max k / n)`` for ``k = 1 .. n``.

    ``n`` is ``num_heads`` rounded up to a power of two; if that is more than there are
    heads, every second slope comes first.
    """
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * k / power) for k in range(1, power + 1)]
    if power != num_heads:
        slopes = slopes[1::2] + slopes[::2]
    return slopes[:num_heads]
