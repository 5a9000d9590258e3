# SPDX-License-Identifier: Apache-2.0
"""Training samples of the pocket models, all made from what Python itself carries.

- ``text``: crops of the standard library's sources.
- ``packed``: short crops one after the other: what came before the last is of no use.
- ``lookup``: crops of StreamEval streams (``sink_paged.evaluation.stream_eval``); the
  answers count in full, the facts, which are random, hardly.
- ``repeat``: a stretch of the sources or of random bytes, repeated to the sample's end;
  what has been seen before counts.

All but the first teach heads to do nothing where nothing matches, which is what a sink
is for. Every sample begins with special tokens, its prefix.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from sink_paged.evaluation.stream_eval import STYLES, generate
from sink_paged.evaluation.texts import HELD_OUT

Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Sample = tuple[Bytes, Weights]

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
        prefixes: tokens that samples begin with, one of these each.
        context: tokens of a sample.
    """

    def __init__(
        self,
        text: Bytes,
        prefixes: list[list[int]],
        context: int,
        shares: dict[str, float],
        lookup_lines: int,
    ) -> None:
        """Prepare.

        Args:
            text: to crop.
            prefixes: tokens that samples begin with, one of these each.
            context: tokens of a sample.
            shares: of ``packed``, ``lookup`` and ``repeat`` among the samples.
            lookup_lines: of the StreamEval stream.
        """
        self.text, self.prefixes, self.context = text, prefixes, context
        self.shares = shares
        self.kinds: dict[str, Callable[[int, Generator], Sample]] = {
            "plain": self._plain,
            "packed": self._packed,
            "lookup": self._lookup,
            "repeat": self._repeat,
        }
        if shares["lookup"]:
            # A fact and a question are some 9 bytes each.
            self.lookup = lookup_text(lookup_lines, context // 18)

    def batch(self, size: int, rng: Generator) -> tuple[Tokens, Weights]:
        """Tokens ``[size, context]`` and the weights of their losses, likewise.

        Losses within the prefix do not count: it is nearly always the same.
        """
        counts = {name: round(size * share) for name, share in self.shares.items()}
        counts = {"plain": size - sum(counts.values()), **counts}
        tokens = np.empty((size, self.context), np.int64)
        weights = np.zeros((size, self.context), np.float32)
        names = [name for name, count in counts.items() for _ in range(count)]
        for row, name in enumerate(names):
            prefix = self.prefixes[0]
            if len(self.prefixes) > 1:
                prefix = self.prefixes[rng.integers(len(self.prefixes))]
            begin = len(prefix)
            tokens[row, :begin] = prefix
            text, kept = self.kinds[name](self.context - begin, rng)
            tokens[row, begin:], weights[row, begin:] = text, kept
        return tokens, weights

    def _plain(self, length: int, rng: Generator) -> Sample:
        start = rng.integers(0, len(self.text) - length)
        return self.text[start : start + length], np.ones(length, np.float32)

    def _packed(self, length: int, rng: Generator) -> Sample:
        """The crops' lengths are log-uniform."""
        parts: list[Bytes] = []
        while sum(map(len, parts)) < length:
            size = int(SHORTEST_CROP * (length / SHORTEST_CROP) ** rng.random())
            start = rng.integers(0, len(self.text) - size)
            parts.append(self.text[start : start + size])
        return np.concatenate(parts)[:length], np.ones(length, np.float32)

    def _lookup(self, length: int, rng: Generator) -> Sample:
        text, weights = self.lookup
        start = rng.integers(0, len(text) - length)
        return text[start : start + length], weights[start : start + length]

    def _repeat(self, length: int, rng: Generator) -> Sample:
        period = int(rng.integers(8, length // 3))
        start = rng.integers(0, len(self.text) - period)
        stretch = self.text[start : start + period]
        if rng.random() < 0.5:
            stretch = rng.integers(32, 127, period).astype(np.uint8)
        weights = np.ones(length, np.float32)
        weights[:period] = 0
        return np.resize(stretch, length), weights
