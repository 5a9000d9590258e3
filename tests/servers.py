# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --sink-eviction`` on the bundled model, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from vllm.utils.network_utils import get_open_port

MODEL = Path(__file__).parents[1] / "models" / "pocket"
START_UP = 480.0


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
    port = get_open_port()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    }
    variables = {**inherited, "VLLM_CPU_KVCACHE_SPACE": "1", **(environment or {})}
    flags = f"--port {port} --sink-eviction {flags}"
    command = [Path(sys.executable).with_name("vllm"), "serve", model, *flags.split()]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_UP
        while not is_healthy(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_healthy(url: str) -> bool:
    """Whether the server is up and ready."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
