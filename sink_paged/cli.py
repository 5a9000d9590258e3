# SPDX-License-Identifier: Apache-2.0
"""The command-line flags; they only fill in ``additional_config["sink_paged"]``."""

from __future__ import annotations

import argparse
from typing import Any

from sink_paged.config import CONFIG_KEY, DEFAULT_SINK_TOKENS, MAX_STREAM_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to one of vLLM's parsers."""
    group = parser.add_argument_group(
        title="SinkEviction",
        description="Endless streams (StreamingLLM): --sink-eviction, --sink-tokens, "
        "--sink-window, --sink-token-id. With --sink-eviction, --max-model-len bounds "
        "the tokens that a stream keeps resident, not how long it may run.",
    )
    group.add_argument(
        "--sink-eviction",
        action="store_true",
        help="Serve streams of any length: keep the first tokens of a text (the sinks) "
        "and the most recent ones, evict the KV blocks between them.",
    )
    group.add_argument(
        "--sink-tokens",
        type=_integer_from(0),
        default=None,
        help="First tokens of a text that stay resident (0 or more; default "
        f"{DEFAULT_SINK_TOKENS}). Needs --sink-eviction.",
    )
    group.add_argument(
        "--sink-window",
        type=_integer_from(1),
        default=None,
        help="Recent tokens that stay resident (1 or more; default: --max-model-len, "
        "by default the model's trained length, less --sink-tokens and 1). Needs "
        "--sink-eviction.",
    )
    group.add_argument(
        "--sink-token-id",
        type=_integer_from(0),
        default=None,
        help="Token to put before every prompt that does not start with it, for models "
        "trained with a dedicated sink token (with --sink-tokens 1). Clients do not "
        "see it. Needs --sink-eviction.",
    )


def settings_from_arguments(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the flags say, or None without ``--sink-eviction``.

    Raises:
        ValueError: for another flag without ``--sink-eviction``.
    """
    given = {
        "sink_tokens": getattr(args, "sink_tokens", None),
        "window_tokens": getattr(args, "sink_window", None),
        "sink_token_id": getattr(args, "sink_token_id", None),
    }
    settings = {name: value for name, value in given.items() if value is not None}
    if getattr(args, "sink_eviction", False):
        return settings
    if settings:
        raise ValueError(
            "--sink-tokens, --sink-window and --sink-token-id need --sink-eviction"
        )
    return None


def merge_settings(
    additional_config: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """``additional_config`` with the flags' settings, which win over its own."""
    present = additional_config.get(CONFIG_KEY) or {}
    return {**additional_config, CONFIG_KEY: {**present, **settings}}


def _integer_from(minimum: int) -> Any:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= MAX_STREAM_TOKENS:
            raise argparse.ArgumentTypeError(
                f"must be an integer in [{minimum}, {MAX_STREAM_TOKENS}], got {text!r}"
            )
        return value

    return integer
