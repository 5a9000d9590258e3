# SPDX-License-Identifier: Apache-2.0
"""What engines that step in turns share, and how long their texts are."""

from __future__ import annotations

from dataclasses import dataclass

SINK_TOKENS = 4
SETTLING_STEPS = 8
BATCHED_TOKENS = 2048
UNTIMED_STEPS = 4
"""First steps of a block: they find the caches full of the other engine's data."""


@dataclass(frozen=True)
class Settings:
    """Of engines and of their blocks of steps.

    Attributes:
        window: tokens that a stream keeps, sinks included.
        streams: numbers of streams that are measured.
        blocks: of steps, of each engine.
        steps: of a block.
        profile_steps: of each profile, 0 for none.
        dtype: of the model, as vLLM names it.
        eager: without torch.compile.
        kv_gib: KV cache of each engine, GiB.
    """

    window: int
    streams: tuple[int, ...]
    blocks: int
    steps: int
    profile_steps: int = 0
    dtype: str = "float32"
    eager: bool = False
    kv_gib: float = 3.0

    @property
    def block_steps(self) -> int:
        """Steps of all blocks of an engine, the untimed and the profiled ones too."""
        return self.blocks * (UNTIMED_STEPS + self.steps) + 2 * self.profile_steps

    def settling_steps(self, streams: int) -> int:
        """Steps before the first block: while the last prompts are read, others write.

        Args:
            streams: that are measured.
        """
        reading = -(-streams * 2 * self.window // BATCHED_TOKENS)
        return SETTLING_STEPS + max(streams, reading)

    def text_lengths(self, side: str, streams: int) -> dict[str, int]:
        """Tokens of the prompts, so that both engines keep as many on average.

        Args:
            side: ``inside`` or ``past`` the window.
            streams: that are measured.
        """
        settling = self.settling_steps(streams)
        if side == "inside":
            prompt = self.window - SINK_TOKENS - self.block_steps - settling
            return {"ours": prompt, "stock": prompt}
        stock = self.window - self.block_steps // 2 - settling
        return {"ours": 2 * self.window, "stock": stock}

    @property
    def longest_text(self) -> int:
        """Tokens that a text of the stock engine may have."""
        settling = self.settling_steps(max(self.streams))
        return self.window + self.block_steps + 2 * settling
