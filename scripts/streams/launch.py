# SPDX-License-Identifier: Apache-2.0
"""Runs a workload in a process of its own and follows its progress."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from streams.workload import Workload

PACKAGES = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 20
"""How long a process may take to end after it said its result."""


CPU_SETTINGS = {
    # One thread a core: by default vLLM leaves a core to the engine core's process.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
} | ({} if torch.cuda.is_available() else CPU_SETTINGS)
"""Environment variables of every peer, unless the user's environment has them."""


def engine_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of every peer, the same for all."""
    merged = SETTINGS | dict(environment)
    # It would override the size of the KV pool.
    merged.pop("VLLM_CPU_KVCACHE_SPACE", None)
    merged["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    paths = [str(PACKAGES), merged.get("PYTHONPATH", "")]
    merged["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return merged


def measure(workload: Workload, log: Path, python: str = sys.executable) -> Any:
    """Run a workload to its end.

    Args:
        workload: what to do.
        log: file for what its process prints.
        python: interpreter that has the peer's packages.

    Returns:
        The last message of ``streams.report.Report``.
    """
    reader, writer = os.pipe()
    command = [python, "-m", "streams.child", str(writer), workload.to_json()]
    try:
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=engine_environment(),
                pass_fds=[writer],
                start_new_session=True,
            )
    except OSError as error:  # of the interpreter, or of the log
        os.close(reader)
        if error.filename != python:
            raise
        reason = f"{Path(python).name} does not run: {error.strerror}"
        return {"skipped": reason, "everywhere": True}
    finally:
        os.close(writer)
    # A process that died leaves its children, which hold the pipe open.
    threading.Thread(target=_reap, args=(process,), daemon=True).start()
    try:
        with os.fdopen(reader) as messages:
            last = _follow(messages, f"{workload.peer}, {workload.streams} streams")
        if last:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:
        _kill(process.pid)
        process.wait()
    if "failed" in last:
        last["failed"] += f" (more in {log})"
    return last or {"failed": _death(process.returncode, log)}


def _follow(messages: Any, name: str) -> dict[str, Any]:
    """Show progress until the last message."""
    bar = tqdm(
        desc=name,
        unit="tok",
        unit_scale=True,
        leave=False,
        position=1,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for line in messages:
            message: dict[str, Any] = json.loads(line)
            if "phase" in message:
                bar.reset(message["total"] or None)
                bar.set_description_str(f"{name}: {message['phase']}")
            elif "tokens" in message:
                bar.update(message["tokens"])
            else:
                return message
    return {}


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    _kill(process.pid)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _death(code: int, log: Path) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    lines = log.read_text(errors="replace").splitlines()
    return "\n  ".join([f"the process ended with {how}; {log} ends with", *lines[-5:]])
