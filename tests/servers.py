# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --sink-eviction`` on the bundled model, as a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "pocket"
sys.path.insert(0, str(ROOT / "scripts"))

from load import server  # noqa: E402


@contextmanager
def running_server(
    log: Path,
    flags: str,
    model: Path = MODEL,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The base URL of a server that answers.

    Args:
        log: file for its output.
        flags: of ``vllm serve``, beside ``--port`` and ``--sink-eviction``.
        model: what it serves.
        environment: variables beside this process's own.
    """
    words = ["--sink-eviction", *flags.split()]
    with server.running_server(str(model), words, log, environment) as started:
        yield started.url
