# SPDX-License-Identifier: Apache-2.0
"""``offline_batch.py --ray``: what it does without Ray, and workers that die.

All but one test run fake engines in real Ray actors, through the script's ``main``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import ray

from sink_paged.offline import Request, Result, UnusableError, ray_data
from sink_paged.offline.ray_data import LineSource, Progress
from sink_paged.offline.ray_slots import Slots, plan
from sink_paged.offline.ray_worker import RETRIES
from tests.test_offline_batch import (
    BAD_LINES,
    SCRIPTS,
    FakeEngine,
    batch,
    encode,
    records,
    tiny_model,  # noqa: F401  (a fixture)
)

# Ray runs its workers at a low priority, which beside other work is none.
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "slots"),
    [
        ([{"CPU": 2}], None, 1, Slots(1, 2, 0, 1)),
        ([{"CPU": 2}], 2, 1, Slots(2, 1, 0, 2)),
        ([{"CPU": 2}], 4, 1, Slots(4, 0.5, 0, 4)),
        ([{"CPU": 16}, {"CPU": 16}], None, 1, Slots(2, 16, 0, 1)),
        ([{"CPU": 16}, {"CPU": 8}], 3, 1, Slots(3, 8, 0, 2)),
        ([{"CPU": 16}, {"CPU": 16}], 3, 1, Slots(3, 8, 0, 2)),
        ([{"memory": 1}, {"CPU": 16}], None, 1, Slots(1, 16, 0, 1)),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 4}], None, 2, Slots(4, 1, 2, 4)),
        ([{"CPU": 16, "GPU": 8}] * 2, 3, 4, Slots(3, 1, 4, 2)),
        ([{"CPU": 16, "GPU": 1}], 5, 1, Slots(5, 1, 1, 1)),
    ],
)
def test_a_cluster_is_divided(
    nodes: list[dict[str, float]], workers: int | None, gpus: int, slots: Slots
) -> None:
    assert plan(nodes, workers, gpus) == slots


@pytest.mark.parametrize(
    ("nodes", "message"),
    [([{"GPU": 1}], "no node of the Ray cluster has 2 GPUs"), ([{}], "has a CPU")],
)
def test_a_cluster_without_a_place_is_refused(
    nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(UnusableError, match=message):
        plan(nodes, None, 2)


class FragileEngine(FakeEngine):
    """A fake engine whose prompts may kill its process, crash it, or wait."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.deadline = time.monotonic() + 120

    def submit(self, request: Request) -> None:
        with (self.folder / "submitted").open("a") as file:
            file.write(f"{request.id}\n")
        super().submit(request)

    def step(self) -> list[Result]:
        first = min(self.waiting, key=lambda r: len(str(r.prompt)))
        what, _, once = str(first.prompt).partition(" ")
        marker = self.folder / f"died of {first.id}"
        if what in ("kill", "crash") and not (once and marker.exists()):
            marker.touch()
            if what == "crash":
                raise RuntimeError("engine died")
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "last" and time.monotonic() < self.deadline:
            written = (self.folder / "out.jsonl").read_bytes().count(b"\n")
            if written < 5:
                time.sleep(0.05)
                return []
        return super().step()


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start_fragile(
    settings: dict[str, Any], sampling: dict[str, Any], share: int = 1
) -> FragileEngine:
    if "broken" in settings:
        raise UnusableError("vLLM did not start: broken")
    return FragileEngine(Path(settings["model"]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray cluster, which the script finds that it is in already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_data.cluster(None):
            yield


class Job:
    """Runs of the script in this process on one input and output."""

    def __init__(self, folder: Path, lines: list[Any], suffix: str = "jsonl") -> None:
        self.folder = folder
        self.source, self.out = folder / f"in.{suffix}", folder / f"out.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), self.source)
        else:
            self.source.write_bytes(b"".join(encode(lines)))

    def run(self, *more: str) -> int:
        files = ("--input", str(self.source), "--output", str(self.out))
        return batch.main(["--model", str(self.folder), *files, "--stock", *more])

    def run_on_ray(self, *more: str) -> int:
        return self.run("--ray", "--workers", "2", "--batch-size", "4", *more)

    def submitted(self) -> list[str]:
        return (self.folder / "submitted").read_text().split()


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The script's engines are fake ones, and its signal handlers do not stay."""
    monkeypatch.setattr(batch, "start_vllm", start_fragile)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def on_ray(test: Any) -> Any:
    """Mark a test of fake engines on the module's cluster."""
    return pytest.mark.slow(pytest.mark.usefixtures("cluster", "fragile")(test))


@on_ray
def test_same_records_as_without_ray(tmp_path: Path) -> None:
    good = [{"id": f"é{n}", "prompt": "a" * n} for n in range(1, 20)]
    kinds = [{"prompt_token_ids": [1, 2]}, {"messages": [{"role": "user"}]}, b"\n"]
    lines = [*good, *BAD_LINES.values(), *kinds, good[0]]
    job = Job(tmp_path, lines)
    assert job.run("--keep-order", "--token-ids") == 1
    expected = job.out.read_bytes()
    job.out.unlink()
    assert job.run_on_ray("--keep-order", "--token-ids") == 1
    assert job.out.read_bytes() == expected
    assert len(records(job.out)) == len(lines) - 1


@on_ray
def test_parquet_in_and_out(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello", "name": None}]
    lines: list[Any] = [
        {"id": "a", "prompt": "x", "seed": 3, "messages": None, "notes": 1},
        {"id": None, "prompt": None, "seed": None, "messages": chat, "notes": 2},
        {"id": "b", "prompt": "refuse", "seed": None, "messages": None, "notes": 3},
    ]
    job = Job(tmp_path, lines, "parquet")
    assert job.run_on_ray("--keep-order", "--token-ids") == 1
    table = pyarrow.parquet.read_table(job.out)
    assert table["id"].to_pylist() == ["a", "2", "b"]
    assert table["token_ids"].to_pylist()[0] == [0]
    assert table["error"].to_pylist() == [None, None, "token out of vocabulary"]
    chat[0].pop("name")
    assert table["text"].to_pylist() == ["X", str(chat).upper(), None]
    written = job.out.read_bytes()
    for again in ("resumed from its records", "anew, without Ray"):
        job.out.unlink()
        if again.startswith("anew"):
            (tmp_path / "out.parquet.jsonl").unlink()
        assert job.run("--keep-order", "--token-ids") == 1
        assert job.out.read_bytes() == written
    assert Counter(job.submitted()) == {"a": 2, "2": 2, "b": 3}


@on_ray
@pytest.mark.parametrize("death", ["kill", "crash"])
def test_lines_of_a_dead_worker_are_run_again(death: str, tmp_path: Path) -> None:
    lines = [{"id": n, "prompt": "a" * (n % 7 + 1)} for n in range(40)]
    lines[11]["prompt"] = f"{death} once"
    job = Job(tmp_path, lines)
    assert job.run_on_ray("--keep-order") == 0
    assert (tmp_path / "died of 11").exists()
    assert [r["id"] for r in records(job.out)] == list(range(40))
    assert Counter(job.submitted())["11"] == 2


@on_ray
def test_a_line_that_kills_its_workers_fails_alone(tmp_path: Path) -> None:
    lines = [{"id": n, "prompt": "a" * 9} for n in range(12)]
    lines[5]["prompt"] = "kill"
    job = Job(tmp_path, lines)
    assert job.run_on_ray() == 1
    outcomes = {r["id"]: r for r in records(job.out)}
    assert len(records(job.out)) == len(outcomes) == 12
    assert [n for n, r in outcomes.items() if "error" in r] == [5]
    assert f"{RETRIES + 1} workers died" in outcomes[5]["error"]


@on_ray
def test_records_are_written_while_others_run(tmp_path: Path) -> None:
    lines = [{"prompt": "last of all, and long"}, *({"prompt": "a"} for _ in range(5))]
    job = Job(tmp_path, lines)
    assert job.run_on_ray() == 0
    assert records(job.out)[-1]["line"] == 1


@on_ray
def test_a_second_run_does_what_is_left(tmp_path: Path) -> None:
    lines: list[Any] = [{"id": f"n{n}", "prompt": "a" * (n + 1)} for n in range(8)]
    lines[2]["prompt"] = "refuse"
    job = Job(tmp_path, lines)
    assert job.run_on_ray() == 1
    kept = [line for line in job.out.read_bytes().splitlines(True)][:5]
    job.out.write_bytes(b"".join(kept) + b'{"id": "n')
    done = {r["id"] for r in map(json.loads, kept) if "text" in r}
    (tmp_path / "submitted").unlink()
    lines[2]["prompt"] = "mended"
    assert Job(tmp_path, lines).run_on_ray() == 0
    assert sorted(r["id"] for r in records(job.out)) == [f"n{n}" for n in range(8)]
    assert {*job.submitted()} == {f"n{n}" for n in range(8)} - done
    (tmp_path / "submitted").unlink()
    assert job.run_on_ray() == 0
    assert not (tmp_path / "submitted").exists()


@on_ray
def test_an_engine_that_does_not_start_is_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, [{"prompt": "a"}] * 3)
    assert job.run_on_ray("--engine-arg", "broken=1") == 2
    assert "error: vLLM did not start: broken" in capsys.readouterr().err
    assert not records(job.out)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_reader_waits_for_unfinished_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(encode({"prompt": "a"} for _ in range(9))))
    progress = ray.remote(num_cpus=0)(Progress).remote()
    wanted = bytearray([1, 0, 1, 1, 1, 1, 1, 0, 1])
    (task,) = LineSource(path, wanted, progress, 3).get_read_tasks(1)
    read: list[Any] = []

    def pull() -> None:
        for block in task():
            read.append(block)

    reader = Thread(target=pull, daemon=True)
    reader.start()
    wait_until(lambda: len(read) == 3)
    for finished, line in enumerate((1, 3, 4, 5), 1):
        reader.join(0.2)
        assert len(read) == finished + 2
        ray.get(progress.finish.remote(line))
        wait_until(lambda: len(read) == finished + 3)  # noqa: B023
    reader.join(60)
    assert len(read) == 7


@contextmanager
def script(model: Path, folder: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script as a process of its own; a test that fails leaves none behind."""
    command = [
        *(sys.executable, SCRIPTS / "offline_batch.py", "--model", model),
        *("--input", folder / "in.jsonl", "--output", folder / "out.jsonl"),
        *("--temperature", "0", "--dtype", "float32", "--enforce-eager"),
        *("--engine-arg", "kv_cache_memory_bytes=268435456", "--keep-order", *more),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **RAY_ENVIRONMENT},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        for left in [*family(process.pid), process]:
            left.kill()
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    """All processes that a process started, and that theirs did."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_engines_interrupted_and_killed(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Real engines: an interrupted run, then one that loses a worker, give it all."""
    lines: list[Any] = [
        {"id": f"n{n}", "prompt": "x = 1\n" * (n + 5), "max_tokens": 80 + 5 * n}
        for n in range(24)
    ]
    lines.insert(3, b"{not json}\n")
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    (tmp_path / "in.jsonl").write_bytes(b"".join(encode(lines)))

    def finished() -> int:
        return out.exists() and sum("text" in r for r in records(out))

    with script(tiny_model, tmp_path, "--ray", "--batch-size", "2") as first:
        wait_until(lambda: finished() >= 2 or first.poll() is not None)
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=300) == 130, log.read_text()
    before = finished()
    assert 2 <= before < 24

    pool = ("--ray", "--workers", "2", "--batch-size", "2")
    with script(tiny_model, tmp_path, *pool) as second:
        wait_until(lambda: finished() >= before + 2 or second.poll() is not None)
        workers = [
            process
            for process in family(second.pid)
            if process.name().startswith("ray::MapWorker")
        ]
        assert len(workers) == 2, log.read_text()
        workers[0].kill()
        assert second.wait(timeout=600) == 1, log.read_text()
    counts = f"{24 - before} finished, 1 failed, {before} finished earlier"
    assert counts in log.read_text()
    on_ray = {r["id"]: r for r in records(out)}
    assert [r["line"] for r in records(out)] == list(range(1, 26))

    out.unlink()
    with script(tiny_model, tmp_path) as plain:
        assert plain.wait(timeout=600) == 1, log.read_text()
    for record in records(out):
        record.pop("cached_tokens", None)
        on_ray[record["id"]].pop("cached_tokens", None)
        assert on_ray[record["id"]] == record
