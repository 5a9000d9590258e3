# SPDX-License-Identifier: Apache-2.0
"""``scripts/load_test.py``: its judgements, its requests, and a short run of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from load import exactness, server  # noqa: E402
from load.bad_requests import catalogue, is_refusal  # noqa: E402
from load.events import EventError, event  # noqa: E402
from load.exactness import Verdict, judge  # noqa: E402
from load.faults import Outcome, first_naming_line  # noqa: E402
from load.memory import LEAST_TOKENS, Samples, fit, judge_memory  # noqa: E402
from load.server import extension_metrics, read_metrics  # noqa: E402
from load.streaming import Answer, stream  # noqa: E402
from load.watch import counters, leftovers  # noqa: E402
from load.workload import Workload, request_body, source_text  # noqa: E402

MIB = 1 << 20


def memory(bytes_per_token: float, jitter: float) -> tuple[list[int], list[int]]:
    """Samples of a process, a thousand tokens apart, that grew by 9 MiB before."""
    rng = random.Random(0)
    tokens = list(range(0, 500_001, 1000))
    rss = [
        700 * MIB
        + min(count, 200_000) * 9 * MIB // 200_000
        + int(bytes_per_token * max(0, count - 200_000) + rng.gauss(0, jitter))
        for count in tokens
    ]
    return tokens, rss


@pytest.mark.parametrize("jitter", [0.0, 0.05 * MIB])
@pytest.mark.parametrize(
    ("bytes_per_token", "ok"), [(0.0, True), (-20.0, True), (1.0, True), (8.0, False)]
)
def test_growth_of_a_list_entry_a_token_is_seen(
    bytes_per_token: float, jitter: float, ok: bool
) -> None:
    growth = fit(*memory(bytes_per_token, jitter), 250_000, 500_000)
    assert growth.tokens == 250_000
    assert growth.ok is ok
    assert abs(growth.bytes_per_token - bytes_per_token) < 0.2


def test_growth_is_judged_against_the_noise() -> None:
    growth = fit(*memory(8.0, 6 * MIB), 250_000, 500_000)
    assert growth.noise == growth.spread > 4 * MIB
    assert growth.ok
    assert not fit(*memory(80.0, 6 * MIB), 250_000, 500_000).ok


def test_buffers_that_come_and_go_do_not_hide_growth() -> None:
    tokens, rss = memory(8.0, 0)
    for index in range(0, len(rss), 7):
        rss[index] += 8 * MIB
    growth = fit(tokens, rss, 250_000, 500_000)
    assert not growth.ok
    assert abs(growth.bytes_per_token - 8.0) < 0.2


def test_growth_over_few_tokens_is_not_judged() -> None:
    tokens, rss = memory(8.0, 0)
    samples = Samples(tokens, {"worker": rss})
    assert judge_memory(samples, 2 * LEAST_TOKENS).keys() == {"worker"}
    assert judge_memory(samples, 2 * LEAST_TOKENS - 1) == {}


def test_growth_of_few_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="too few samples"):
        fit(*memory(8.0, 0), 0, 1)


def test_verdicts() -> None:
    tokens = [5, 6, 7, 8]
    asked: list[int] = []

    def near_tie(index: int) -> bool:
        asked.append(index)
        return index == 2

    assert judge(tokens, tokens, near_tie) == (Verdict.EQUAL, None)
    assert judge(tokens, [5, 6, 9, 9], near_tie) == (Verdict.NEAR_TIE, 2)
    assert judge(tokens, [5, 1, 7, 8], near_tie) == (Verdict.DIFFERENT, 1)
    assert asked == [2, 1]
    assert judge(tokens, tokens[:2], near_tie) == (Verdict.DIFFERENT, 2)


class Scripted(exactness.Undisturbed):
    """An undisturbed server that writes 1, 2, 3 and puts ``gap`` before token 4."""

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def run(self, answer: Answer, max_tokens: int, logprobs: int | None) -> Any:
        tokens = [1, 2, 3][:max_tokens]
        scores = [-9.0, -9.0, -9.0, -9.0, -9.0]
        scores[tokens[-1]], scores[4] = -0.5, -0.5 - self.gap
        named = {f"token_id:{token}": score for token, score in enumerate(scores)}
        return {"token_ids": tokens, "logprobs": {"top_logprobs": [named]}}


@pytest.mark.parametrize(
    ("tokens", "gap", "verdict"),
    [
        ([1, 2, 3], 1.0, Verdict.EQUAL),
        ([1, 4, 4], 1e-4, Verdict.NEAR_TIE),
        ([1, 4, 4], 1e-2, Verdict.DIFFERENT),
        ([1, 0, 3], 1e-4, Verdict.DIFFERENT),
    ],
)
def test_greedy_answers_may_differ_from_a_near_tie_on(
    tokens: list[int], gap: float, verdict: Verdict
) -> None:
    answer = Answer(0, {"temperature": 0.0}, tokens=tokens)
    assert Scripted(gap).compare(answer).verdict is verdict


def test_seeded_draws_are_judged_with_their_random_numbers() -> None:
    """A token is a near tie only where a small rise makes the sampler choose it."""
    logprobs = [-1.0, -1.2, -1.4, -1.6]
    seed, step = 7, 5
    chosen = exactness.draw(logprobs, seed, step)
    assert chosen == exactness.draw(logprobs, seed, step)
    assert {exactness.draw(logprobs, seed, s) for s in range(40)} == {0, 1, 2, 3}
    other = (chosen + 1) % 4
    # Raise the other token until it all but wins.
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        raised = [x + middle * (i == other) for i, x in enumerate(logprobs)]
        wins = exactness.draw(raised, seed, step) == other
        low, high = (low, middle) if wins else (middle, high)
    for rise, expected in ((low - 1e-3, True), (low - 1e-2, False)):
        raised = [x + rise * (i == other) for i, x in enumerate(logprobs)]
        near = exactness.seeded_near_tie(raised, seed, step, chosen, other)
        assert near is expected
    with pytest.raises(RuntimeError, match="draws another token"):
        exactness.seeded_near_tie(logprobs, seed, step, other, chosen)


def test_bad_requests_differ_and_are_bad_in_one_thing() -> None:
    bad = catalogue("m")
    assert len({one.name for one in bad}) == len(bad) > 40
    assert len({(one.path, one.body) for one in bad}) == len(bad)
    good = {"model": "m", "prompt": "x = 1\n", "max_tokens": 3}
    for one in bad:
        try:
            body = json.loads(one.body)
        except ValueError:
            continue
        if one.path == "/v1/completions" and isinstance(body, dict):
            changed = [key for key in body if body[key] != good.get(key, body)]
            assert len(changed) == 1, one.name
    assert [is_refusal(status) for status in (200, 400, 404, 422, 500)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_workload_repeats_and_has_all_kinds() -> None:
    workload = Workload(0, 256)
    sessions = [workload.session(number) for number in range(400)]
    assert sessions == [Workload(0, 256).session(number) for number in range(400)]
    assert sessions[3] != Workload(1, 256).session(3)
    turns = [turn for session in sessions for turn in session.turns]
    assert any(session.chat and len(session.turns) > 2 for session in sessions)
    assert max(len(turn.text) for turn in turns) > 7 * 256
    assert max(turn.params["max_tokens"] for turn in turns) > 9 * 256
    leaves = [turn.disconnect for turn in turns if turn.disconnect]
    assert any(leave.after_seconds is not None for leave in leaves)
    assert any(leave.after_tokens is not None for leave in leaves)
    for turn in turns:
        left = turn.disconnect and turn.disconnect.after_tokens
        assert not left or 0 < left < turn.params["max_tokens"]
        assert turn.text in source_text()
    kinds = Counter(key for turn in turns for key in turn.params)
    assert min(kinds.values()) > 20
    assert {"seed", "repetition_penalty", "logprobs"} <= kinds.keys()


def test_conversations_ask_for_logprobs_as_chats_do() -> None:
    workload = Workload(0, 256)
    for session in map(workload.session, range(300)):
        if session.chat and "logprobs" in session.turns[0].params:
            messages = [{"role": "user", "content": "a"}]
            path, body = request_body("m", session, messages, session.turns[0])
            assert path == "/v1/chat/completions"
            assert body["logprobs"] is True
            assert body["top_logprobs"] == 2
            assert body["messages"] == messages
            return
    pytest.fail("no such conversation")


EXPOSITION = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 1.0
vllm:num_requests_running{engine="1"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
# TYPE vllm:sink_paged_blocks_pinned gauge
vllm:sink_paged_blocks_pinned{engine="0"} 4.0
# TYPE vllm:sink_paged_blocks_evicted counter
vllm:sink_paged_blocks_evicted_total{engine="0"} 9.0
# TYPE python_gc_objects_collected counter
python_gc_objects_collected_total{generation="0"} 5.0
"""


def test_leftovers_are_gauges_that_are_not_zero() -> None:
    metrics = read_metrics(EXPOSITION)
    assert metrics["vllm:num_requests_running"] == 3
    assert "python_gc_objects_collected_total" not in metrics
    assert extension_metrics(metrics).keys() == {
        "vllm:sink_paged_blocks_pinned",
        "vllm:sink_paged_blocks_evicted_total",
    }
    assert leftovers(metrics) == {
        "vllm:num_requests_running": 3,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:sink_paged_blocks_pinned": 4,
    }


def test_a_server_that_does_not_fail_loudly_has_problems() -> None:
    loud: dict[str, Any] = {
        "killed": "worker",
        "streams": 8,
        "client_errors": {"error": 9},
        "answered": 0,
        "hanging": 0,
        "seconds_to_last_error": 1.0,
        "seconds_to_exit": 4.0,
        "exit_status": 1,
        "survivors": [],
        "logged": "ERROR Worker proc died unexpectedly",
    }
    assert not Outcome(**loud).problems()
    quiet: dict[str, Any] = {
        "answered": 1,
        "hanging": 1,
        "exit_status": None,
        "survivors": ["12 VLLM::EngineCore"],
        "logged": None,
    }
    for name, value in quiet.items():
        assert len(Outcome(**loud | {name: value}).problems()) == 1, name
    log = "INFO died unexpectedly\n(EngineCore) ERROR Worker proc X died unexpectedly\n"
    assert first_naming_line(log) == log.splitlines()[1]
    assert first_naming_line("INFO all is well\n") is None


def test_a_load_without_prefix_cache_queries_has_no_share_of_hits() -> None:
    names = ("prefix_cache_hits", "prefix_cache_queries", "generation_tokens")
    before = {f"vllm:{name}_total": 0.0 for name in (*names, "num_preemptions")}
    after = before | {"vllm:generation_tokens_total": 7.0}
    assert counters(before, after) == {
        "generation_tokens": 7,
        "preemptions": 0,
        "prefix_cache_hit_share": None,
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'data: {"choices": []}\n', {"choices": []}),
        ('data:{"a": 1}', {"a": 1}),
        (b"\n", None),
        ("", None),
        (b": ping\n", None),
        (b"event: ping\n", None),
        (b"data: [DONE]\n", None),
        ("data: [DONE]", None),
    ],
)
def test_events(line: bytes | str, said: dict[str, Any] | None) -> None:
    assert event(line) == said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'data: {"error": {"code": 400}}\n', "the server sent {'code': 400}"),
        ("data: {half", "not JSON"),
        ("data: [1]", "no object"),
    ],
)
def test_events_that_are_errors(line: bytes | str, message: str) -> None:
    with pytest.raises(EventError, match=message):
        event(line)


def ask(lines: list[bytes], most: int | None = None) -> Answer:
    """What a client makes of a stream; its longest line has 2,000 bytes."""

    async def answering(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(line + b"\n\n")
        return response

    async def asking() -> Answer:
        application = web.Application()
        application.router.add_post("/v1/completions", answering)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        answer = Answer(0, {})
        try:
            async with aiohttp.ClientSession(
                f"http://{host}:{port}", read_bufsize=1000
            ) as http:
                await stream(
                    http, "/v1/completions", {}, answer, lambda tokens: None, most
                )
        finally:
            await runner.cleanup()
        return answer

    return asyncio.run(asking())


def written(tokens: list[int], reason: str | None = None) -> bytes:
    choice = {"token_ids": tokens, "text": "a" * len(tokens), "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode()


def test_a_stream_is_read_to_its_end() -> None:
    answer = ask([written([1]), b": ping", written([2, 3], "length"), b"data: [DONE]"])
    assert answer.tokens == [1, 2, 3]
    assert "".join(answer.text) == "aaa"
    assert answer.finish_reason == "length"
    assert answer.timing.success
    assert not answer.left
    assert ask([written([1]), written([2]), written([3], "length")], 2).left


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (b"data: " + b"x" * 5000, aiohttp.ClientPayloadError, "too long"),
        (b'data: {"error": "broken"}', EventError, "the server sent broken"),
        (b"data: [DONE]", aiohttp.ClientPayloadError, "without a finish reason"),
    ],
)
def test_a_stream_that_breaks_off(
    line: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask([written([1]), line])


def test_a_users_variables_reach_the_server() -> None:
    user = {
        "HF_HUB_OFFLINE": "0",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    assert server.server_environment(user) == {
        "HF_HUB_OFFLINE": "0",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
    }
    assert server.server_environment({}) == server.SETTINGS


def test_what_a_server_was_given_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The caller's variables go before the user's."""
    started: dict[str, Any] = {}
    monkeypatch.setattr(
        server.subprocess, "Popen", lambda command, **how: started.update(how)
    )
    for name in server.RECORDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "auto"}
    given = server.Server("m", [], tmp_path / "log", bind)
    recorded = given.recorded_environment()
    assert recorded == {
        "OMP_NUM_THREADS": None,
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "VLLM_USE_FASTOKENS": None,
    }
    assert recorded == {name: started["env"].get(name) for name in recorded}


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """The script from end to end: every check but memory's, judged, and passed."""
    command = [sys.executable, SCRIPTS / "load_test.py", "--quick"]
    kept = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    done = subprocess.run(
        [*command, "--output-dir", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPTS.parent,
        env={name: value for name, value in os.environ.items() if name not in kept},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["failed_checks"] == []
    assert result["provenance"]["argv"][0] == "--quick"
    assert result["written_output_tokens"] >= 10_000
    assert result["completed"] > 20
    assert result["failed"] == 0
    assert result["preemptions"] > 0
    rate = result["total_output_tokens"] / result["duration"]
    assert result["output_throughput"] == pytest.approx(rate)
    refused = {int(code) for codes in result["refusals"].values() for code in codes}
    assert refused <= {400, 404, 405, 422}
    assert result["refusals"].keys() == {bad.name for bad in catalogue("m")}
    assert result["counts"]["retries"] > 0
    assert result["spot_checks"]["counts"]["different"] == 0
    assert sum(result["spot_checks"]["counts"].values()) == 10
    assert result["memory"] == {}
    assert result["exit_status_as_stock"] == {"worker": None, "engine core": None}
    assert "exit status as stock vLLM  not compared" in done.stdout
    assert [fault["killed"] for fault in result["faults"]] == ["engine core", "worker"]
    for fault in result["faults"]:
        assert sum(fault["client_errors"].values()) == fault["streams"] + 1
    assert (tmp_path / "load.png").stat().st_size > 10_000
