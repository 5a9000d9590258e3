# SPDX-License-Identifier: Apache-2.0
"""``scripts/bench_turns.py``: on the server of these tests, and without one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.chat.api import BLOCK

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_turns.py"
sys.path.insert(0, str(SCRIPT.parent))

import bench_turns  # noqa: E402
from load.events import EventError  # noqa: E402
from load.server import ServerError  # noqa: E402

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
    assert result["environment"] is None
    assert result["server_flags"] is None
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


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    arguments = ["--server", "http://127.0.0.1:9", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED: [Errno 111] Connection refused" in done.stderr


@pytest.mark.parametrize("given", ["--server", "--model"])
def test_the_environment_is_that_of_the_server(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unknown where the server was started elsewhere; a single turn has no quartiles.

    This process's own variables do not matter.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = {"OMP_NUM_THREADS": "1", "VLLM_USE_FASTOKENS": None}
    server = SimpleNamespace(
        url="http://a", recorded_environment=lambda: dict(environment)
    )

    @contextmanager
    def running_server(*args: Any) -> Iterator[Any]:
        yield server

    def measure(args: Any, url: str) -> list[bench_turns.Chat]:
        message = {"role": "user", "content": "a"}
        return [bench_turns.Chat([message], [9, 12], [9, 3], [0.02, 0.04], [0.1])]

    monkeypatch.setattr(bench_turns, "running_server", running_server)
    monkeypatch.setattr(bench_turns, "measure", measure)
    bench_turns.main([given, "http://a", "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "turns.json").read_text())
    started = given == "--model"
    assert result["environment"] == (environment if started else None)
    assert (result["server_flags"] is None) is not started


@pytest.mark.parametrize(
    ("seconds", "text"),
    [([], None), ([0.0123], "12"), ([0.01, 0.02, 0.03], "20 (15-25)")],
)
def test_milliseconds(seconds: list[float], text: str | None) -> None:
    assert bench_turns.milliseconds(seconds) == text


def chunk(content: str, **more: Any) -> str:
    choice = {"delta": {"content": content}, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


def ask(body: str, status: int = 200) -> tuple[float, str, dict[str, Any]]:
    """What a client makes of an answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(status, text=body)

    transport = httpx.MockTransport(answer)
    with httpx.Client(base_url="http://a", transport=transport) as http:
        return bench_turns.Client(http, 5).ask([{"role": "user", "content": "a"}])


def test_an_answer_is_read_to_its_end() -> None:
    usage = f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 3}})}\n\n"
    body = chunk("") + ": ping\n\n" + chunk("a") + chunk("b") + usage
    first, text, found = ask(body + "data: [DONE]\n\n")
    assert first > 0
    assert text == "ab"
    assert found == {"prompt_tokens": 3}


def test_answers_that_fail() -> None:
    with pytest.raises(EventError, match="the server sent too long"):
        ask(chunk("a") + 'data: {"error": "too long"}\n\n')
    with pytest.raises(ServerError, match="HTTP 500"):
        ask("", 500)
    with pytest.raises(ServerError, match="no answer"):
        ask("data: [DONE]\n\n")
