# SPDX-License-Identifier: Apache-2.0
"""The cache policy as integers: which keys, which blocks, which distances.

``S`` sink tokens and ``R`` window tokens form the cache config ``S+R`` of StreamingLLM
(Xiao et al., 2023, section 3.2). Text positions count from 0. Half-open intervals::

    attended by the query at i:  [0, min(S, i-R))  +  [max(0, i-R), i]
    blocks kept for it:          [0, pinned)       +  [first_window_block(i), ...)

Nothing here knows vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


def cdiv(numerator: int, denominator: int) -> int:
    """``ceil(numerator / denominator)`` in integers."""
    return -(-numerator // denominator)


@dataclass(frozen=True)
class SinkWindow:
    """Token-level policy of a cache config ``S+R``.

    Attributes:
        sink_tokens: ``S``, the first tokens of the text, kept for ever; may be 0.
        window_tokens: ``R``, the most recent tokens before the query; at least 1.
    """

    sink_tokens: int
    window_tokens: int

    def __str__(self) -> str:
        """``S+R``."""
        return f"{self.sink_tokens}+{self.window_tokens}"

    @property
    def capacity(self) -> int:
        """``C = S + R``: the tokens a full cache holds beside the query's own."""
        return self.sink_tokens + self.window_tokens

    def attends(self, query: int, key: int) -> bool:
        """Whether the query at text position ``query`` sees the key at ``key``."""
        recent = key >= query - self.window_tokens
        return key <= query and (recent or key < self.sink_tokens)

    def distance(self, query: int, key: int) -> int:
        """Distance in cache slots between a query and a key that it attends."""
        if key >= query - self.window_tokens:
            return query - key
        return min(query, self.capacity) - key

    def cut_off_sinks(self, query: int) -> range:
        """Sink keys that have left the window of ``query``."""
        return range(min(self.sink_tokens, max(0, query - self.window_tokens)))

    def recent_keys(self, query: int) -> range:
        """Keys at their true distance, the query's own included."""
        return range(max(0, query - self.window_tokens), query + 1)


def layer_window(
    stream: SinkWindow, own_window: int | None, model_window: int | None
) -> SinkWindow:
    """What a layer keeps, given the sliding windows that the model was trained with.

    Such a window counts the query's own token. A layer that has one while others have
    none, or a longer one, keeps its own and no sinks. Where all layers have the same,
    the streams' window has been chosen within it.

    Args:
        stream: the cache config.
        own_window: the layer's sliding window, None for a global layer.
        model_window: the sliding window of every layer of the model, None if there is
            no such thing.
    """
    if own_window is None or own_window == model_window:
        return stream
    return SinkWindow(0, own_window - 1)


@dataclass(frozen=True)
class BlockWindow:
    """Block-level policy: pin the sinks' blocks, free the others first in, first out.

    Memory is block-granular: a block stays while any token in it is attended.

    Attributes:
        window: the token-level policy.
        block_size: tokens a block.
    """

    window: SinkWindow
    block_size: int

    @cached_property
    def pinned_blocks(self) -> int:
        """Blocks ``[0, pinned_blocks)`` of a stream are never freed."""
        return cdiv(self.window.sink_tokens, self.block_size)

    def first_window_block(self, next_query: int) -> int:
        """The oldest block behind the pinned ones that ``next_query`` still needs."""
        oldest_key = max(0, next_query - self.window.window_tokens)
        return max(self.pinned_blocks, oldest_key // self.block_size)

    def expiry(self, block: int) -> int:
        """Text position of the first query that no longer needs a window block."""
        return self.window.window_tokens + (block + 1) * self.block_size

    def resident_blocks(self, next_query: int, num_tokens: int) -> int:
        """Blocks held by a stream of ``num_tokens`` slots before ``next_query`` runs.

        Counts the pinned blocks and ``[first_window_block, ceil(num_tokens / b))``.
        """
        total = cdiv(num_tokens, self.block_size)
        if total <= self.pinned_blocks:
            return total
        return self.pinned_blocks + max(0, total - self.first_window_block(next_query))

    def max_blocks(self, tokens_in_flight: int) -> int:
        """The most blocks a stream ever holds, whatever its length."""
        window = self.window.window_tokens + tokens_in_flight
        return self.pinned_blocks + cdiv(window, self.block_size) + 1

    def column(self, block: int, num_columns: int) -> int:
        """Column of the text's ``block`` in a ring block table of ``num_columns``."""
        pinned = self.pinned_blocks
        if block < pinned:
            return block
        return pinned + (block - pinned) % (num_columns - pinned)

    def longest_hit(
        self, max_blocks: int, is_cached: Callable[[int], bool], align: int = 1
    ) -> int:
        """The longest cached prefix a stream can resume from, in blocks.

        A hit of ``h`` blocks needs the pinned blocks and those that the query at
        ``h * block_size`` still attends; what was evicted between may be gone.

        Args:
            max_blocks: longest hit allowed.
            is_cached: whether the text's block is in the prefix cache.
            align: a hit must be a multiple of this many blocks.
        """
        prefix = 0
        while prefix < min(self.pinned_blocks, max_blocks) and is_cached(prefix):
            prefix += 1
        if prefix < self.pinned_blocks:
            return prefix - prefix % align
        end = max_blocks - max_blocks % align
        while end > self.pinned_blocks:
            oldest = self.first_window_block(end * self.block_size)
            block = end - 1
            while block >= oldest and is_cached(block):
                block -= 1
            if block < oldest:
                return end
            end = block - block % align
        return min(end, self.pinned_blocks - self.pinned_blocks % align)
