# SPDX-License-Identifier: Apache-2.0
"""Where a model's attention goes: its logits over short texts, the first tokens' share.

The average logits are Figure 2 of StreamingLLM (Xiao et al., 2023). A model of Hugging
Face runs its own eager attention, in blocks of queries, through an attention function
that also looks at what goes in and what comes out. Sums are kept, never all the maps.

Covered is every causal model that dispatches through Transformers'
``AttentionInterface``, with MHA, GQA or MQA, soft-capped logits, learned sink logits,
sliding windows. The logits are computed here a second time, as the model does not hand
them out; a model whose own softmax says something else is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]

IMPLEMENTATION = "sink_paged_observed"
BLOCK = 1 << 25
"""Attention weights of a layer that are held at once."""
FIRST = 4
"""First tokens that are looked at, as many as the paper keeps."""
PARTS = ("first token", "first four tokens", "four tokens before the query")
"""What ``Shares`` has the shares of."""


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
        if not apart < (1e-3 if self.weights.dtype == torch.float32 else 0.1):
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


class LogitSums:
    """Observer: average attention logits of texts that are shown whole."""

    def __init__(self) -> None:
        """Nothing seen."""
        self._sums: dict[int, Tensor] = {}
        self._texts: dict[int, int] = {}

    def see(self, rows: Rows) -> None:
        """Add the logits."""
        if rows.start or rows.query.shape[2] != rows.key.shape[2]:
            raise ValueError("too many logits to average: use shorter texts")
        total = rows.logits().double().sum(dim=0)
        self._sums[rows.layer] = self._sums.get(rows.layer, 0) + total
        self._texts[rows.layer] = self._texts.get(rows.layer, 0) + len(rows.query)

    def means(self) -> dict[int, Array]:
        """By layer, ``[heads, queries, keys]``; NaN where a query sees no key."""
        means = {}
        for layer, total in sorted(self._sums.items()):
            mean = (total / self._texts[layer]).cpu().numpy()
            means[layer] = np.where(np.isfinite(mean), mean, np.nan)
        return means


class ShareSums:
    """Observer: shares of attention that ``PARTS`` take, norms of the first tokens.

    Shares are means over the queries of each bin and over texts. A norm is that of a
    key or value over the median norm of the text's tokens after the first four, each
    of one KV head; its mean over heads and texts is kept.

    Args:
        edges: query positions, ascending; bin ``i`` is ``[edges[i], edges[i + 1])``.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        """Nothing seen."""
        self.edges = list(edges)
        self._shares: dict[int, Tensor] = {}
        self._norms: dict[int, list[Tensor]] = {}

    def see(self, rows: Rows) -> None:
        """Add the shares, and the norms when the text's last keys are there."""
        shares = _shares(rows).sum(dim=1, dtype=torch.float64)
        positions = torch.arange(rows.start, rows.key.shape[2], device=shares.device)
        edges = torch.tensor(self.edges, device=shares.device)
        # Bin 0 and the last one are what lies outside of the edges.
        bins = torch.bucketize(positions, edges, right=True)
        if rows.layer not in self._shares:
            size = (*shares.shape[:2], len(edges) + 1)
            self._shares[rows.layer] = shares.new_zeros(size)
            self._norms[rows.layer] = []
        self._shares[rows.layer].index_add_(2, bins, shares)
        if rows.key.shape[2] == self.edges[-1]:
            norms = [_relative_norms(x) for x in (rows.key, rows.value)]
            self._norms[rows.layer].append(torch.stack(norms).cpu())

    def shares(self) -> dict[int, Array]:
        """By layer, ``[parts, heads, bins]`` in the order of ``PARTS``."""
        sizes = np.diff(self.edges)
        return {
            layer: sums[..., 1:-1].cpu().numpy() / (sizes * self._num_texts(layer))
            for layer, sums in sorted(self._shares.items())
        }

    def norms(self) -> dict[int, Array]:
        """By layer, of keys and values ``[2, FIRST]``."""
        return {
            layer: torch.cat(norms, dim=1).mean(dim=1).double().numpy()
            for layer, norms in sorted(self._norms.items())
        }

    def _num_texts(self, layer: int) -> int:
        return sum(norms.shape[1] for norms in self._norms[layer])


def _shares(rows: Rows) -> Tensor:
    """Of ``PARTS``, float32 ``[parts, texts, heads, queries]``."""
    weights = rows.weights
    queries = torch.arange(rows.start, weights.shape[-1], device=weights.device)
    before = queries[:, None] - torch.arange(1, FIRST + 1, device=weights.device)
    index = before.clamp(min=0).expand(*weights.shape[:2], -1, -1)
    recent = weights.gather(-1, index).float() * (before >= 0)
    first = weights[..., :FIRST].float()
    return torch.stack((first[..., 0], first.sum(dim=-1), recent.sum(dim=-1)))


def _relative_norms(rows: Tensor) -> Tensor:
    """Norms of the first tokens over the others' median, ``[texts, FIRST]``."""
    norms = rows.float().norm(dim=-1)
    median = norms[..., FIRST:].median(dim=-1, keepdim=True).values
    return (norms[..., :FIRST] / median).mean(dim=1)


def position_bins(trained: int, length: int, first: int = 8) -> list[int]:
    """Edges of bins that grow from ``first`` on, about four to a doubling.

    Args:
        trained: an edge too where it is less than ``length``.
        length: the last edge, above ``first``.
        first: the first edge.
    """
    edges = {first}
    low = first
    for high in sorted({min(trained, length), length}):
        steps = max(1, round(4 * math.log2(high / low)))
        edges |= {round(edge) for edge in np.geomspace(low, high, steps + 1)}
        low = high
    return sorted(edges)


def cut_texts(
    documents: Sequence[Sequence[int]],
    count: int,
    length: int,
    prefix: Sequence[int],
    seed: int,
) -> Tokens:
    """Texts from random places of documents, ``[count, length]``.

    Args:
        documents: token ids; every place of every document is as likely as another.
        count: of the texts.
        length: of each in tokens, ``prefix`` included.
        prefix: what comes before each, as a BOS token.
        seed: of the places; equal seeds give equal texts.

    Raises:
        ValueError: when no document is long enough.
    """
    body = length - len(prefix)
    places = [max(0, len(document) - body + 1) for document in documents]
    if body < 1 or not any(places):
        raise ValueError(
            f"no text of {length:,} tokens can be cut: the longest document has "
            f"{max(map(len, documents), default=0):,} tokens"
        )
    ends = np.cumsum(places)
    texts = np.empty((count, length), np.int64)
    texts[:, : len(prefix)] = prefix
    drawn = np.random.default_rng(seed).integers(ends[-1], size=count)
    for text, place in zip(texts, drawn, strict=True):
        which = int(np.searchsorted(ends, place, side="right"))
        start = int(place) - int(ends[which]) + places[which]
        text[len(prefix) :] = documents[which][start : start + body]
    return texts
