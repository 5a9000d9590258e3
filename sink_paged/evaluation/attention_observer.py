# SPDX-License-Identifier: Apache-2.0
"""A look at the attention of a model of Hugging Face as it runs.

The model runs its own eager attention, in blocks of queries, through an attention
function that shows an observer what goes in and what comes out.

Covered is every causal model that dispatches through Transformers'
``AttentionInterface``, with MHA, GQA or MQA, soft-capped logits, learned sink logits,
sliding windows. The logits are computed here a second time, as the model does not hand
them out; a model whose own softmax says something else is refused.
"""

from __future__ import annotations

import math
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

Tokens = npt.NDArray[np.int64]

IMPLEMENTATION = "sink_paged_observed"
BLOCK = 1 << 25
"""Attention weights of a layer that are held at once."""


@dataclass(frozen=True)
class Rows:
    """Attention of a block of queries of one layer.

    Attributes:
        layer: its index in the model.
        start: position of the first query; the last one is the newest key.
        query: ``[texts, heads, queries, head_size]``.
        key: ``[texts, kv_heads, keys, head_size]``.
        value: ``[texts, kv_heads, keys, value_size]``.
        mask: ``[1 or texts, 1 or heads, queries, keys]``, added to the logits.
        weights: after the softmax, ``[texts, heads, queries, keys]``.
        options: what the model hands to its attention function besides.
    """

    layer: int
    start: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    weights: Tensor
    options: dict[str, Any]

    def logits(self) -> Tensor:
        """Scaled, soft-capped and masked (-inf), float32, in the shape of the weights.

        Raises:
            ValueError: when their softmax is not what the model computed.
        """
        scale = self.options.get("scaling") or self.query.shape[-1] ** -0.5
        groups = self.query.shape[1] // self.key.shape[1]
        key = self.key.float().repeat_interleave(groups, dim=1)
        logits = self.query.float() @ key.mT * scale
        cap = self.options.get("softcap")
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        hidden = self.mask <= torch.finfo(self.mask.dtype).min / 2
        logits = (logits + self.mask.float()).masked_fill(hidden, -math.inf)
        self._check(logits)
        return logits

    def _check(self, logits: Tensor) -> None:
        weights = self.weights.float()
        # A learned sink logit takes a part of the whole.
        weights = weights / weights.sum(dim=-1, keepdim=True)
        apart = (logits.softmax(dim=-1) - weights).abs().sum(dim=-1).mean() / 2
        if not apart < (1e-3 if self.weights.dtype == torch.float32 else 0.05):
            raise ValueError(
                f"layer {self.layer} computes its attention in a way that is not known "
                f"here: {float(apart):.2g} of the weights are elsewhere"
            )


class Observer(Protocol):
    """What is shown the attention of a model that runs."""

    def see(self, rows: Rows) -> None:
        """Take from ``rows`` what is wanted; they are freed afterwards."""


_observer: ContextVar[Observer] = ContextVar("observer")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    code = sys.modules[type(module).__module__]
    texts, heads, length, _ = query.shape
    if attention_mask is None or key.shape[2] != length:
        raise ValueError(f"{type(module).__name__} is no causal self-attention")
    queries = max(1, BLOCK // (texts * heads * length))
    outputs = []
    for start in range(0, length, queries):
        end = min(start + queries, length)
        parts = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        mask = attention_mask[..., start:end, :end]
        output, weights = code.eager_attention_forward(module, *parts, mask, **options)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        _observer.get().see(Rows(layer, start, *parts, mask, weights, options))
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def load_model(name: str, device: str, dtype: str | torch.dtype) -> PreTrainedModel:
    """A causal model that may be observed.

    Args:
        name: a local folder or a name, as Transformers takes it.
        device: of torch.
        dtype: of its weights; ``auto``: as in the checkpoint.

    Raises:
        OSError: when there is none.
        ValueError: when its attention cannot be observed.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return make_observable(model.to(device).eval())


def make_observable(model: PreTrainedModel) -> PreTrainedModel:
    """Switch the attention of ``model``; it then only runs under ``observe``.

    Raises:
        ValueError: when it does not use ``AttentionInterface``.
    """
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"{type(model).__name__} cannot be observed: in Transformers it does not "
            "dispatch through AttentionInterface"
        )
    return model


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    texts: Tokens,
    observer: Observer,
    batch: int = 1,
    name: str = "",
) -> None:
    """Run ``model`` over texts of equal length, before the eyes of ``observer``.

    Args:
        model: of ``load_model``.
        texts: token ids ``[texts, length]``.
        observer: what is to look.
        batch: texts that run at once.
        name: of the progress bar; none is shown without it.
    """
    token = _observer.set(observer)
    try:
        with tqdm(total=len(texts), desc=name, unit="text", disable=not name) as bar:
            for ids in np.array_split(texts, math.ceil(len(texts) / batch)):
                inputs = torch.as_tensor(ids, device=model.device)
                model.base_model(input_ids=inputs, use_cache=False)
                bar.update(len(ids))
    finally:
        _observer.reset(token)
