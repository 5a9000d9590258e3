# SPDX-License-Identifier: Apache-2.0
"""Model runner V2, the default on CUDA, end to end; see ``tests/v2_cases.py``."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import has_v2_drafter

ROOT = Path(__file__).parent.parent


def drafting(method: str, *arguments: str) -> Any:
    """Cases for a vLLM whose runner drafts by ``method``."""
    reason = f"model runner V2 of this vLLM does not draft by {method}"
    skip = pytest.mark.skipif(not has_v2_drafter(method), reason=reason)
    return pytest.param(list(arguments), marks=skip)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["losses_and_tokens"],
        ["cuda_backend", "--cuda-backend"],
        ["eight_bit_cache", "--cuda-backend"],
        ["flash_attention_route", "--cuda-backend"],
        ["sampling"],
        ["bad_words"],
        ["slots_of_far_positions", "prefix_cache_hits"],
        ["several_groups"],
        ["several_groups_cuda", "--cuda-backend"],
        ["sessions"],
        ["preemption"],
        drafting("draft_model", "speculation", "speculation_seeds"),
        drafting("draft_model", "speculation_cuda", "--cuda-backend"),
        drafting("ngram", "n_grams"),
        drafting("ngram", "flash_attention_drafts", "--cuda-backend"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_v2_runner(arguments: list[str]) -> None:
    """In a process whose Triton is the interpreter and whose runner is V2."""
    command = [sys.executable, "-m", "tests.v2_cases", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("passed\n")
