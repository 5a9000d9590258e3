# SPDX-License-Identifier: Apache-2.0
"""What an evaluation compares, by the names of the paper's tables.

``dense`` keeps every token, ``recompute`` encodes the most recent ones anew for every
token, ``S+R`` keeps ``S`` sinks and a window of ``R`` (``0+R``: window attention).
``S+R@text`` is the same with the sinks' positions counted in the text.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from sink_paged.config import CONFIG_KEY, Positions
from sink_paged.window import SinkWindow

_NAME = re.compile(r"(\d+)\+(\d+)(@text)?")


@dataclass(frozen=True)
class CacheConfig:
    """One of the compared configs.

    Attributes:
        kind: which of the three it is.
        window: ``S+R``, None for ``dense`` and ``recompute``.
        positions: see ``SinkConfig``.
    """

    kind: Literal["dense", "recompute", "sinks"]
    window: SinkWindow | None = None
    positions: Positions = "cache"

    def __str__(self) -> str:
        """The name that ``parse`` reads."""
        if self.window is None:
            return self.kind
        return f"{self.window}@text" if self.positions == "text" else f"{self.window}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read ``dense``, ``recompute``, ``4+1020`` or ``4+1020@text``.

        Raises:
            ValueError: for anything else.
        """
        if name in ("dense", "recompute"):
            return cls(name)  # type: ignore[arg-type]
        match = _NAME.fullmatch(name)
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"{name!r} is no cache config: write dense, recompute, or S+R with S "
                "sink tokens and R of at least 1, as in 4+1020, or 4+1020@text"
            )
        window = SinkWindow(int(match[1]), int(match[2]))
        return cls("sinks", window, "text" if match[3] else "cache")

    def engine_options(self, trained_length: int, num_tokens: int) -> dict[str, Any]:
        """Options of vLLM's ``LLM`` that serve texts of ``num_tokens`` this way.

        Args:
            trained_length: the model's.
            num_tokens: of the longest request, prompt and output.
        """
        if self.window is not None:
            settings: dict[str, Any] = {
                "sink_tokens": self.window.sink_tokens,
                "window_tokens": self.window.window_tokens,
            }
            if self.positions != "cache":
                settings["positions"] = self.positions
            return {"additional_config": {CONFIG_KEY: settings}}
        length = max(num_tokens, trained_length)
        # Stock vLLM has rotations up to the length in the model's config only.
        return {
            "max_model_len": length,
            "hf_overrides": {"max_position_embeddings": length},
        }


def cache_config(name: str) -> CacheConfig:
    """``CacheConfig.parse`` as a converter of argparse, which shows its message."""
    try:
        return CacheConfig.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def paper_configs(capacity: int) -> list[CacheConfig]:
    """The paper's Table 2 at a cache of ``capacity`` tokens: 0, 1, 2, 4 and 8 sinks."""
    sinks = [count for count in (0, 1, 2, 4, 8) if count < capacity]
    return [CacheConfig("dense"), CacheConfig("recompute")] + [
        CacheConfig("sinks", SinkWindow(count, capacity - count)) for count in sinks
    ]
