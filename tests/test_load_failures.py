# SPDX-License-Identifier: Apache-2.0
"""``scripts/load_test.py`` where servers fail: a load is kept, what failed is said."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import load_test  # noqa: E402
from load import exactness, faults, server  # noqa: E402
from load.bad_requests import catalogue  # noqa: E402
from load.checks import OURS, STOCK, compare_exit_statuses  # noqa: E402
from load.clients import Clients  # noqa: E402
from load.exactness import Verdict  # noqa: E402
from load.faults import FaultError, Outcome  # noqa: E402
from load.memory import Samples  # noqa: E402
from load.report import table  # noqa: E402
from load.streaming import Answer  # noqa: E402

IDLE = {
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "vllm:num_preemptions_total": 3.0,
    "vllm:prefix_cache_hits_total": 0.0,
    "vllm:prefix_cache_queries_total": 0.0,
    "vllm:generation_tokens_total": 9.0,
}


class StubServer:
    """Has no process; may fail when it is asked for its metrics."""

    url, model = "http://127.0.0.1:9", "m"

    def __init__(self) -> None:
        self.fails = False

    def metrics(self) -> dict[str, float]:
        if self.fails:
            raise httpx.ConnectError("gone")
        return dict(IDLE)

    def recorded_environment(self) -> dict[str, str | None]:
        return {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubServer:
    """A server under a load that one answer of two tokens ends."""
    stub = StubServer()

    @contextmanager
    def running_server(*args: Any) -> Iterator[StubServer]:
        yield stub

    async def observe(
        observed: Any, clients: Clients, concurrency: int, samples: Samples, series: Any
    ) -> None:
        answer = Answer(5, {"temperature": 0.0}, prompt=[1], tokens=[1, 2])
        answer.timing.success, answer.timing.latency = True, 1.0
        clients.seen.finished.append(answer)
        clients.seen.refusals = {bad.name: Counter({400: 1}) for bad in catalogue("m")}
        clients.seen.written = 2

    monkeypatch.setattr(load_test, "running_server", running_server)
    monkeypatch.setattr(load_test, "observe", observe)
    monkeypatch.setattr(load_test, "warm_up", lambda server: None)
    monkeypatch.setattr(load_test.signal, "signal", lambda *args: None)
    arguments = ["load_test.py", "--quick", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    return stub


def run_main(*more: str) -> tuple[int, dict[str, Any]]:
    """The exit status and what was written."""
    sys.argv += more
    with pytest.raises(SystemExit) as stop:
        load_test.main()
    path = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    return int(stop.value.code or 0), json.loads((path / "load.json").read_text())


def same(undisturbed: Any, answers: Any, count: int, seed: int) -> Iterator[Any]:
    yield exactness.Comparison(5, False, 1, 2, Verdict.EQUAL)


def test_a_load_that_passes(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "spot_checks", same)
    status, result = run_main("--no-faults")
    assert (status, result["failed_checks"]) == (0, [])
    assert result["completed"] == 1
    assert result["prefix_cache_hit_share"] is None
    assert result["environment"] == {"OMP_NUM_THREADS": "1"}
    assert result["spot_checks"]["counts"]["equal"] == 1
    assert result["exit_status_as_stock"] == {}


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.HTTPStatusError(
            "500 Server Error",
            request=httpx.Request("POST", "http://a"),
            response=httpx.Response(500),
        ),
        RuntimeError("session 5: two undisturbed runs differ"),
        KeyError("choices"),
    ],
)
def test_a_load_outlives_an_error_in_the_spot_checks(
    error: Exception,
    stub: StubServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*args: Any) -> Iterator[Any]:
        saved = json.loads((tmp_path / "load.json").read_text())
        assert saved["completed"] == 1, "it is saved before"
        yield from same(*args)
        raise error

    monkeypatch.setattr(load_test, "spot_checks", failing)
    status, result = run_main("--no-faults")
    assert status == 1
    ((check, why),) = result["failed_checks"]
    assert check == "spot checks"
    assert why == f"{type(error).__name__}: {error}"
    assert result["spot_checks"]["counts"]["equal"] == 1
    assert f"FAILED: spot checks: {why}" in capsys.readouterr().out


def test_a_load_outlives_its_server(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies with the last answer, and no other starts: every check says so."""
    observed = load_test.observe

    async def observe(*args: Any) -> None:
        await observed(*args)
        stub.fails = True

    async def kill(*args: Any) -> Outcome:
        raise FaultError("the server has no engine core")

    def other_faults(args: Any, result: dict[str, Any]) -> None:
        @contextmanager
        def no_server(*args: Any) -> Iterator[Any]:
            raise server.ServerError("the server did not start")
            yield

        monkeypatch.setattr(load_test, "running_server", no_server)
        run_other_faults(args, result)

    run_other_faults = load_test.run_other_faults
    monkeypatch.setattr(load_test, "observe", observe)
    monkeypatch.setattr(load_test, "kill_under_load", kill)
    monkeypatch.setattr(load_test, "run_other_faults", other_faults)
    status, result = run_main()
    assert status == 1
    assert result["completed"] == 1
    assert [tuple(failure) for failure in result["failed_checks"]] == [
        ("leak", "ConnectError: gone"),
        ("spot checks", "ConnectError: [Errno 111] Connection refused"),
        ("leak", "ConnectError: gone"),
        (
            "engine core killed, sink eviction",
            "FaultError: the server has no engine core",
        ),
        ("worker killed, sink eviction", "ServerError: the server did not start"),
    ]
    assert result["exit_status_as_stock"] == {"worker": None, "engine core": None}


def fault(engine: str, killed: str, status: int | None) -> dict[str, Any]:
    return {"engine": engine, "killed": killed, "exit_status": status}


def test_exit_statuses_are_compared_where_both_were_killed() -> None:
    failed: list[tuple[str, str]] = []
    ours = [fault(OURS, role, 0) for role in ("engine core", "worker")]
    assert compare_exit_statuses(ours, failed) == {"engine core": None, "worker": None}
    both = [*ours, fault(STOCK, "worker", 0)]
    assert compare_exit_statuses(both, failed) == {"engine core": None, "worker": True}
    assert not failed
    both += [fault(STOCK, "engine core", 1)]
    assert compare_exit_statuses(both, failed) == {"engine core": False, "worker": True}
    ((check, why),) = failed
    assert check == "engine core killed, as stock vLLM"
    assert why == "exit statuses {'sink eviction': 0, 'stock vLLM': 1}"


def test_the_table_says_what_was_not_compared() -> None:
    result: dict[str, Any] = {
        "counts": {},
        "memory": {},
        "spot_checks": {"counts": {}},
        "faults": [],
        "exit_status_as_stock": {"worker": None, "engine core": True},
        "failed_checks": [],
    }
    assert table(result).splitlines() == [
        "worker killed, exit status as stock vLLM       not compared",
        "engine core killed, exit status as stock vLLM  yes",
    ]


@pytest.mark.parametrize(
    ("tokens", "ends", "message"),
    [
        (5, ValueError("broken off"), "a stream ended too early: broken off; the log"),
        (5, None, "a stream ended too early: its answer is complete; the log"),
        (3, ..., "after 0.2 s a stream had 3 tokens of 9: the log"),
    ],
)
def test_why_nothing_could_be_killed(
    tokens: int, ends: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time to get past the window is not mistaken for a stream that ends."""

    async def write(http: Any, model: str, answer: Answer) -> None:
        answer.tokens += [0] * tokens
        if ends is ...:
            await asyncio.sleep(60)
        if ends:
            raise ends

    monkeypatch.setattr(faults, "_write", write)
    monkeypatch.setattr(faults, "FILLING", 0.2 if ends is ... else 60.0)
    stub: Any = SimpleNamespace(
        url="http://127.0.0.1:9",
        model="m",
        processes=lambda: {"worker": [None]},
        log_tail=lambda: "the log",
    )
    with pytest.raises(FaultError, match=message):
        asyncio.run(faults.kill_under_load(stub, "worker", 2, 9))
