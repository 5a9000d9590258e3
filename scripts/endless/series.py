# SPDX-License-Identifier: Apache-2.0
"""What is seen while a text grows."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field

from endless.engine import Engine

MEMORY_SECONDS = 0.5
"""Between two looks at the memory."""


@dataclass
class Series:
    """What was seen while the text grew.

    Attributes:
        tokens: text length after each step, of one stream.
        seconds: duration of each step.
        memory: per process, bytes resident at ``memory_tokens``.
        blocks: KV blocks held at ``memory_tokens``.
    """

    tokens: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    memory_tokens: array[float] = field(default_factory=lambda: array("d"))
    memory: dict[str, array[float]] = field(default_factory=dict)
    blocks: array[float] = field(default_factory=lambda: array("d"))


class Recorder:
    """Fills a ``Series`` while an engine is stepped."""

    def __init__(self, engine: Engine) -> None:
        """Start the clock."""
        self.engine = engine
        self.series = Series(memory={role: array("d") for role in engine.processes})
        self._sampled, self._last = 0.0, time.perf_counter()

    def after_step(self, text: int, timed: bool = True) -> None:
        """Note a step and now and then the memory; ``text`` is the text's length."""
        now, series = time.perf_counter(), self.series
        if timed:
            series.tokens.append(text)
            series.seconds.append(now - self._last)
        if now - self._sampled > MEMORY_SECONDS:
            self._sampled = now
            for role, resident in self.engine.memory().items():
                series.memory[role].append(resident)
            series.memory_tokens.append(text)
            series.blocks.append(self.engine.blocks())
        self._last = time.perf_counter()
