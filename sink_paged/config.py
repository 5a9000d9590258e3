# SPDX-License-Identifier: Apache-2.0
"""What the user may set, validated.

The settings live in ``additional_config["sink_paged"]`` of a vLLM config, the one place
that reaches every process of vLLM; the command-line flags only fill it in. What they
mean for a model is resolved once, beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from sink_paged.window import SinkWindow

CONFIG_KEY = "sink_paged"
RESOLVED_KEY = "sink_paged_resolved"
DEFAULT_SINK_TOKENS = 4
MAX_STREAM_TOKENS = 2**31 - 1
"""Longest text of a stream: vLLM counts tokens in int32."""
Positions = Literal["cache", "text"]
"""Where the sinks stand for a query past the window: see ``SinkConfig``."""


@dataclass(frozen=True)
class SinkConfig:
    """Typed form of ``additional_config["sink_paged"]``.

    Attributes:
        sink_tokens: first tokens of the text that stay resident; 0 or more.
        window_tokens: recent tokens that stay resident, at least 1; ``None`` takes
            what ``--max-model-len`` leaves beside the sinks and the query.
        sink_token_id: token that is put before every prompt that does not start with
            it; ``None`` for none. Needs ``sink_tokens`` of at least 1.
        positions: ``"cache"`` counts positions inside the cache, as StreamingLLM does.
            ``"text"`` leaves the sinks where they stand in the text, with a gap that
            grows: for evaluation only, models break past their trained length.

    Raises:
        ValueError: naming the setting and its legal range.
    """

    sink_tokens: int = DEFAULT_SINK_TOKENS
    window_tokens: int | None = None
    sink_token_id: int | None = None
    positions: Positions = "cache"

    def __post_init__(self) -> None:
        """Check types and ranges that need no model."""
        _check_integer("sink_tokens", self.sink_tokens, 0)
        if self.window_tokens is not None:
            _check_integer("window_tokens", self.window_tokens, 1)
        if self.sink_token_id is not None:
            _check_integer("sink_token_id", self.sink_token_id, 0)
            if self.sink_tokens < 1:
                raise ValueError(
                    "sink_token_id needs sink_tokens of at least 1, or the token "
                    "would be evicted with the others"
                )
        if self.positions not in get_args(Positions):
            known = " or ".join(map(repr, get_args(Positions)))
            raise ValueError(f"positions must be {known}, got {self.positions!r}")

    @classmethod
    def from_mapping(cls, settings: Any) -> Self:
        """Read the user's mapping, or what it would make; unknown keys are refused."""
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping):
            raise ValueError(
                f'additional_config["{CONFIG_KEY}"] must be a mapping of settings '
                f"({_known_settings()}), got {type(settings).__name__}: {settings!r}"
            )
        unknown = sorted(set(map(str, settings)) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f'unknown setting in additional_config["{CONFIG_KEY}"]: '
                f"{', '.join(unknown)}; known settings: {_known_settings()}"
            )
        return cls(**settings)

    def resolve(
        self, max_model_len: int, sliding_window: int | None = None
    ) -> SinkWindow:
        """The cache config for a resident bound of ``max_model_len`` tokens.

        Args:
            max_model_len: the most resident tokens, the query's own included.
            sliding_window: tokens, the query's own included, that every layer of the
                model was trained to see at most; None where there are global layers.

        Raises:
            ValueError: when ``S + R + 1`` does not fit into ``max_model_len``, or
                ``R + 1`` into ``sliding_window``.
        """
        window = self.window_tokens
        if window is None:
            window = max_model_len - self.sink_tokens - 1
            if window < 1:
                raise ValueError(
                    f"sink_tokens={self.sink_tokens} leaves no room for a window: "
                    f"with --max-model-len {max_model_len} (by default the model's "
                    f"trained length) it must be in [0, {max_model_len - 2}]"
                )
            if sliding_window is not None:
                window = max(1, min(window, sliding_window - 1))
        resident = self.sink_tokens + window + 1
        if resident > max_model_len:
            raise ValueError(
                f"sink_tokens + window_tokens + 1 = {resident} is above "
                f"{max_model_len}, the resident tokens that --max-model-len (by "
                "default the model's trained length) allows: with "
                f"sink_tokens={self.sink_tokens}, window_tokens must be in "
                f"[1, {max(1, max_model_len - self.sink_tokens - 1)}], got {window}"
            )
        if sliding_window is not None and window > sliding_window - 1:
            raise ValueError(
                f"every layer of this model has a sliding window of {sliding_window} "
                "tokens, the query's own included, and was never trained on longer "
                f"distances: window_tokens must be in [1, {sliding_window - 1}], "
                f"got {window}"
            )
        return SinkWindow(self.sink_tokens, window)


@dataclass(frozen=True)
class StreamConfig:
    """The settings as resolved for a model; with it an engine is a streaming one.

    Attributes:
        window: the cache config.
        resident_tokens: what the user's ``--max-model-len`` said, the bound on a
            stream's resident tokens. vLLM's own ``max_model_len`` is then the longest
            text, ``MAX_STREAM_TOKENS``.
        sink_token_id: token put before every prompt; None for none.
        positions: where the sinks stand for a query past the window.
    """

    window: SinkWindow
    resident_tokens: int
    sink_token_id: int | None = None
    positions: Positions = "cache"

    @property
    def query_limit(self) -> int:
        """The position at which queries stay as far as the sinks are concerned."""
        cache = self.positions == "cache"
        return self.window.capacity if cache else MAX_STREAM_TOKENS

    def store(self, additional_config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``additional_config`` that carries this to vLLM's processes."""
        values = [
            self.window.sink_tokens,
            self.window.window_tokens,
            self.resident_tokens,
            self.sink_token_id,
            self.positions,
        ]
        return {**additional_config, RESOLVED_KEY: values}

    @classmethod
    def load(cls, additional_config: Any) -> Self | None:
        """What ``store`` wrote, or None for an engine without sink eviction."""
        if not isinstance(additional_config, Mapping):
            return None
        values = additional_config.get(RESOLVED_KEY)
        if values is None:
            return None
        sink_tokens, window_tokens, *others = values
        return cls(SinkWindow(sink_tokens, window_tokens), *others)

    def default_max_tokens(self, prompt_tokens: int) -> int:
        """Output tokens of a request that names no ``max_tokens``.

        As a stock server of ``--max-model-len N`` would cap it: what the prompt leaves
        of ``N``. For a prompt that such a server would refuse, the most that it could
        give to any.
        """
        left = self.resident_tokens - prompt_tokens
        return left if left > 0 else max(1, self.resident_tokens - 1)


def sink_settings(additional_config: Any) -> Any | None:
    """The user's ``sink_paged`` settings, or ``None`` when the extension is off.

    Raises:
        ValueError: for a key without a value, which would else pass for off.
    """
    if (
        not isinstance(additional_config, Mapping)
        or CONFIG_KEY not in additional_config
    ):
        return None
    settings = additional_config[CONFIG_KEY]
    if settings is None:
        raise ValueError(
            f'additional_config["{CONFIG_KEY}"] has no value: write {{}} for the '
            "defaults, or leave the key out to turn sink eviction off"
        )
    return settings


def _known_settings() -> str:
    return ", ".join(SinkConfig.__dataclass_fields__)


def _check_integer(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"{name} must be an integer in [{minimum}, {MAX_STREAM_TOKENS}], "
            f"got {type(value).__name__}: {value!r}"
        )
    if not minimum <= value <= MAX_STREAM_TOKENS:
        raise ValueError(
            f"{name} must be in [{minimum}, {MAX_STREAM_TOKENS}], got {value}"
        )
