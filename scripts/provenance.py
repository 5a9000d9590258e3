# SPDX-License-Identifier: Apache-2.0
"""What a reader of a result file needs to repeat the run."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import vllm

import sink_paged

SCRIPTS = Path(__file__).resolve().parent


def provenance() -> dict[str, object]:
    """Revision, versions, script, arguments and hardware, without paths of the machine.

    ``git_revision`` is None where the scripts lie in no git repository.
    """
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if "model name" in x), model)
    return {
        "git_revision": revision(SCRIPTS),
        "sink_paged": sink_paged.__version__,
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "script": Path(sys.argv[0]).name,
        "argv": [without_folders(argument) for argument in sys.argv[1:]],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def revision(folder: Path) -> str | None:
    """The commit that ``folder`` is at, with ``-dirty`` if files were changed since.

    None outside a repository and without git.
    """
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    command = ["git", "--no-optional-locks", "-C", str(folder), *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def without_folders(argument: str) -> str:
    """An absolute path, or one behind ``--option=``, by its last name alone."""
    option, equals, value = "", "", argument
    if argument.startswith("-"):
        option, equals, value = argument.partition("=")
    if os.path.isabs(value):
        value = Path(value).name
    return option + equals + value
