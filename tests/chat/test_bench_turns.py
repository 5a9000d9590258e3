# SPDX-License-Identifier: Apache-2.0
"""``scripts/bench_turns.py`` on the server of these tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.chat.api import BLOCK

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_turns.py"
HISTORIES = (900, 2500)
TURNS, COLD, ANSWER = 3, 1800, 6
QUESTION = 100


def test_turns_of_short_and_long_histories(server: str, tmp_path: Path) -> None:
    """Each computes its question, the answer before, and what no block had room for."""
    arguments = ["--server", server, "--histories", *map(str, HISTORIES)]
    arguments += ["--turns", str(TURNS), "--cold", str(COLD)]
    arguments += ["--answer-tokens", str(ANSWER), "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    result = json.loads((tmp_path / "turns.json").read_text())
    assert (tmp_path / "turns.png").stat().st_size > 10_000
    assert "turn" in done.stdout
    for chat, length in zip(result["chats"], HISTORIES, strict=True):
        prompts = chat["prompt_tokens"]
        assert 0.8 * length < prompts[0] < 1.2 * length + 4 * QUESTION
        assert prompts == sorted(prompts)
        assert len(prompts) == len(chat["ttft"]) == TURNS
        assert min(chat["ttft"]) > 0
        new = [b - a for a, b in zip(prompts, prompts[1:], strict=False)]
        computed = chat["computed_tokens"][1:]
        assert all(
            n - ANSWER <= c <= n + BLOCK for n, c in zip(new, computed, strict=True)
        ), (new, computed)
        assert len(chat["cold"]) == sum(tokens <= COLD for tokens in prompts)
    assert result["chats"][0]["cold"]
    assert not result["chats"][1]["cold"]


def test_a_server_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--server", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED: [Errno 111] Connection refused" in done.stderr
