# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` as a process of its own: start, processes, metrics, stop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from vllm.utils.network_utils import get_open_port

START_UP = 600.0
"""Seconds a server may take to answer; on busy cores compiling takes minutes."""
SHUT_DOWN = 60.0
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""Environment of every server where the user's has none of these."""
OWN = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
"""Variables that scripts and tests set for their own process, not for a server."""
RECORDED = (
    "OMP_NUM_THREADS",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_USE_FASTOKENS",
)
"""Variables that figures depend on."""


class ServerError(Exception):
    """The server did not start, or died."""


class Server:
    """A running server.

    Attributes:
        url: base URL.
        model: the name that requests give.
        log: file of what its processes print.
        environment: variables that it was given.
        process: the API server, root of the process tree.
    """

    def __init__(
        self,
        model: str,
        flags: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Start it; it may take a minute until ``wait`` returns.

        ``environment`` goes before the user's variables.
        """
        port = get_open_port()
        self.url = f"http://127.0.0.1:{port}"
        self.model, self.log = model, log
        command = [str(Path(sys.executable).with_name("vllm")), "serve", model]
        self.command = [*command, "--port", str(port), *flags]
        self.environment = {**server_environment(), **environment}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def wait(self) -> None:
        """Until it answers.

        Raises:
            ServerError: it ended or took too long; with the end of the log.
        """
        deadline = time.monotonic() + START_UP
        while not self._is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the server did not start: {self.log_tail()}")
            time.sleep(0.5)
        self.processes()

    def _is_healthy(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def recorded_environment(self) -> dict[str, str | None]:
        """Variables that its figures depend on; None for what it was not given."""
        return {name: self.environment.get(name) for name in RECORDED}

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Its living processes by role: API server, engine core, worker, other."""
        roles: dict[str, list[psutil.Process]] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    role = "API server" if process == root else role_of(process)
                    self._seen[process.pid] = process
                    roles.setdefault(role, []).append(process)
        return roles

    def survivors(self) -> list[psutil.Process]:
        """Processes ever seen in its tree that live still, orphans too."""
        self.processes()
        return [process for process in self._seen.values() if _lives(process)]

    def metrics(self) -> dict[str, float]:
        """Its ``/metrics`` of the ``vllm:`` family, summed over their labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        return read_metrics(text)

    def log_tail(self, lines: int = 8) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n  ".join([f"{self.log} ends with", *text[-lines:]])

    def stop(self) -> int:
        """Stop it as a user would; its exit status. What does not end is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SHUT_DOWN)
        for process in self.survivors():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return self.process.wait()


def server_environment(user: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of every server; those of the ``user`` go before ``SETTINGS``."""
    return SETTINGS | {k: v for k, v in user.items() if k not in OWN}


def role_of(process: psutil.Process) -> str:
    """Which part of vLLM it is: ``engine core``, ``worker`` or ``other``."""
    title = "".join(process.cmdline()) + process.name()
    for role, mark in (("engine core", "EngineCore"), ("worker", "Worker")):
        if mark in title:
            return role
    return "other"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def running_server(
    model: str,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that answers, stopped at the end with all of its processes.

    Args:
        model: what it serves.
        flags: of ``vllm serve``, beside ``--port``.
        log: file of what its processes print.
        environment: variables that go before the user's.
    """
    server = Server(model, flags, log, environment or {})
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def read_metrics(text: str) -> dict[str, float]:
    """Values of an exposition by sample name, summed over labels, vLLM's alone.

    Buckets and creation times are left out.
    """
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and not sample.name.endswith(
                ("_bucket", "_created")
            ):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def extension_metrics(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Those of sink_paged, by name."""
    return {k: v for k, v in metrics.items() if k.startswith("vllm:sink_paged_")}
