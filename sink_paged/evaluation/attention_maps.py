# SPDX-License-Identifier: Apache-2.0
"""Where a model's attention goes: its logits over short texts, the first tokens' share.

The average logits are Figure 2 of StreamingLLM (Xiao et al., 2023). Observers of
``attention_observer`` keep sums, never all the maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sink_paged.evaluation.attention_observer import Rows, Tokens

Array = npt.NDArray[np.float64]

FIRST = 4
"""First tokens that are looked at, as many as the paper keeps."""
PARTS = ("first token", "first four tokens", "four tokens before the query")
"""Whose shares are taken."""


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
