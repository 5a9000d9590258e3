# SPDX-License-Identifier: Apache-2.0
"""What a reader of a result file needs to repeat the run."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import vllm


def provenance() -> dict[str, object]:
    """Revision, versions, arguments and hardware."""
    revision = ""
    if shutil.which("git"):
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if "model name" in x), model)
    return {
        "git_revision": revision,
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "argv": sys.argv[1:],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
