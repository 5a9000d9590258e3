# SPDX-License-Identifier: Apache-2.0
"""Training samples of the pocket models, all made from what Python itself carries.

- ``text``: crops of the standard library's sources.
- ``packed``: short crops one after the other: what came before the last is of no use.
- ``lookup``: crops of StreamEval streams (``sink_paged.evaluation.stream_eval``); the
  answers count in full, the facts, which are random, hardly.
- ``repeat``: a stretch of the sources or of random bytes, repeated to the sample's end;
  what has been seen before counts.

All but the first teach heads to do nothing where nothing matches, which is what a sink
is for. Every sample begins with the same tokens, its prefix.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sink_paged.evaluation.stream_eval import STYLES, generate
from sink_paged.evaluation.texts import HELD_OUT

Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "__pycache__",
}
LOOKUP_SEED = 1
"""Evaluations start from 0 by default; seeds of streams that were trained on."""
FACT_WEIGHT = 0.02
SHORTEST_CROP = 8


def standard_library_files() -> list[Path]:
    """Python sources of the running interpreter's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def load_corpus() -> tuple[Bytes, Bytes]:
    """Training and held-out text as byte arrays, ``uint8 [num_bytes]``."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in standard_library_files():
        (held_out if path.stem in HELD_OUT else train).append(path.read_bytes())
    if not train or not held_out:
        raise SystemExit("this Python carries no standard library sources to train on")
    left, right = (
        np.frombuffer(b"\n".join(part), np.uint8) for part in (train, held_out)
    )
    return left, right


def lookup_text(lines: int, farthest: int) -> tuple[Bytes, Weights]:
    """A StreamEval stream with a question every 4 lines, and its bytes' weights."""
    texts, weights = [], []
    distances = range(1, farthest + 1)
    for piece in generate(LOOKUP_SEED, STYLES["short"], lines, 4, distances):
        data = piece.text.encode()
        texts.append(data)
        weight = 1.0 if piece.is_answer else FACT_WEIGHT
        weights.append(np.full(len(data), weight, np.float32))
    return np.frombuffer(b"".join(texts), np.uint8), np.concatenate(weights)


class Sampler:
    """Draws training batches.

    Attributes:
        prefix: tokens that every sample begins with.
        context: tokens of a sample.
    """

    def __init__(
        self,
        text: Bytes,
        prefix: list[int],
        context: int,
        shares: dict[str, float],
        lookup_lines: int,
    ) -> None:
        """Prepare.

        Args:
            text: to crop.
            prefix: tokens that every sample begins with.
            context: tokens of a sample.
            shares: of ``packed``, ``lookup`` and ``repeat`` among the samples.
            lookup_lines: of the StreamEval stream.
        """
        self.text, self.prefix, self.context = text, prefix, context
        self.shares = shares
        if shares["lookup"]:
            # A fact and a question are some 9 bytes each.
            self.lookup = lookup_text(lookup_lines, context // 18)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tokens, Weights]:
        """Tokens ``[size, context]`` and the weights of their losses, likewise."""
        kinds = {name: round(size * share) for name, share in self.shares.items()}
        plain = size - sum(kinds.values())
        rows = [self._crop(self.text, None, rng) for _ in range(plain)]
        rows += [self._packed(rng) for _ in range(kinds["packed"])]
        rows += [self._crop(*self.lookup, rng) for _ in range(kinds["lookup"])]
        rows += [self._repeat(rng) for _ in range(kinds["repeat"])]
        tokens, weights = (np.stack(part) for part in zip(*rows, strict=True))
        return tokens, weights

    def _crop(self, text: Bytes, weights: Weights | None, rng: Any) -> Any:
        length = self.context - len(self.prefix)
        start = rng.integers(0, len(text) - length)
        kept = np.ones(length, np.float32)
        if weights is not None:
            kept = weights[start : start + length]
        return self._with_prefix(text[start : start + length], kept)

    def _packed(self, rng: Any) -> Any:
        """The crops' lengths are log-uniform."""
        length = self.context - len(self.prefix)
        parts: list[Bytes] = []
        while sum(map(len, parts)) < length:
            size = int(SHORTEST_CROP * (length / SHORTEST_CROP) ** rng.random())
            start = rng.integers(0, len(self.text) - size)
            parts.append(self.text[start : start + size])
        text = np.concatenate(parts)[:length]
        return self._with_prefix(text, np.ones(length, np.float32))

    def _repeat(self, rng: Any) -> Any:
        length = self.context - len(self.prefix)
        period = int(rng.integers(8, length // 3))
        start = rng.integers(0, len(self.text) - period)
        stretch = self.text[start : start + period]
        if rng.random() < 0.5:
            stretch = rng.integers(32, 127, period).astype(np.uint8)
        weights = np.ones(length, np.float32)
        weights[:period] = 0
        return self._with_prefix(np.resize(stretch, length), weights)

    def _with_prefix(self, text: Bytes, weights: Weights) -> tuple[Tokens, Weights]:
        """Losses within the prefix do not count: it is always the same."""
        tokens = np.concatenate([self.prefix, text.astype(np.int64)])
        nothing = np.zeros(len(self.prefix), np.float32)
        return tokens, np.concatenate([nothing, weights])
