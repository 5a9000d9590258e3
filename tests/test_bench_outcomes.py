# SPDX-License-Identifier: Apache-2.0
"""What the throughput benchmark keeps of what was measured, skipped and failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_streams  # noqa: E402
from streams.result import Recorder  # noqa: E402
from streams.workload import Workload  # noqa: E402

Message = dict[str, Any]
Called = list[tuple[str, int, int]]


def measured() -> Message:
    """The message of a run of two streams."""
    recorder = Recorder(2, 10, lambda tokens: None)
    for step in range(1, 4):
        for stream in (0, 1):
            recorder.wrote(stream, moment=recorder.start + step)
    figures = dict.fromkeys(("num_preemptions", "kv_blocks_peak", "kv_blocks"))
    return {"result": recorder.result(3, peak_rss_bytes=1, **figures).to_json()}


class Bench:
    """The script in ``folder``, with a ``measure`` that is given.

    Attributes:
        messages: what ``measure`` returns, by peer and window; else a measurement.
        called: peer, window and streams of what was measured.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.messages: dict[tuple[str, int], Message] = {}
        self.called: Called = []
        self.saved: list[int] = []
        monkeypatch.setattr(bench_streams, "measure", self._measure)

    def _measure(self, workload: Workload, log: Path, python: str) -> Message:
        file = self.folder / "streams.json"
        known = self.document if file.exists() else {"measurements": [], "problems": []}
        self.saved.append(len(known["measurements"]) + len(known["problems"]))
        self.called.append((workload.peer, workload.window, workload.streams))
        return dict(self.messages.get((workload.peer, workload.window), measured()))

    def run(self, *arguments: str) -> None:
        command = ["bench_streams.py", "--output-dir", str(self.folder), *arguments]
        self.monkeypatch.setattr(sys, "argv", command)
        args = bench_streams.parse_arguments()
        bench_streams.run(args, "/a/model", "/a/scratch")

    @property
    def document(self) -> Any:
        return json.loads((self.folder / "streams.json").read_text())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_skip_holds_for_its_cell_alone(bench: Bench, capsys: Any) -> None:
    """In all repetitions; other windows are measured."""
    bench.messages["vllm", 64] = {"skipped": "no room", "everywhere": False}
    bench.run(
        *("--peers", "vllm", "sink_paged", "--window", "64", "96"),
        *("--concurrency", "2", "--repetitions", "2"),
    )
    assert bench.called.count(("vllm", 64, 2)) == 1
    assert bench.called.count(("vllm", 96, 2)) == 2
    assert bench.called.count(("sink_paged", 64, 2)) == 2
    document = bench.document
    assert document["problems"] == [
        {
            "kind": "skipped",
            "reason": "no room",
            "peer": "vllm",
            "window": 64,
            "streams": 2,
            "repetition": None,
        }
    ]
    assert len(document["measurements"]) == 6
    assert document["measurements"][0]["model"] == "random-29m"
    assert "scratch" not in document["measurements"][0]
    assert "vllm, window 64, 2 streams skipped: no room" in capsys.readouterr().out


@pytest.mark.parametrize("python", [None, "/no/python"])
def test_a_peer_that_cannot_run_is_skipped_everywhere(
    bench: Bench, python: str | None
) -> None:
    bench.messages["openvino", 64] = {"skipped": "no module", "everywhere": True}
    bench.run(
        *("--peers", "openvino", "sink_paged", "--window", "64", "96"),
        *("--concurrency", "2", "4", "--repetitions", "2"),
        *(("--openvino-python", python) if python else ()),
    )
    peers = [peer for peer, _, _ in bench.called]
    assert peers.count("openvino") == (1 if python else 0)
    assert peers.count("sink_paged") == 8
    (problem,) = bench.document["problems"]
    assert (problem["peer"], problem["window"]) == ("openvino", None)
    assert problem["reason"].startswith("no module" if python else "no --openvino")


def test_failures_are_kept_by_repetition_and_tried_again(
    bench: Bench, capsys: Any
) -> None:
    """The last outcome is in the file too, each before the next measurement."""
    log = bench.folder / "logs" / "hf.log"
    bench.messages["hf", 64] = {"failed": f"out of memory (more in {log})"}
    bench.run(
        *("--peers", "sink_paged", "hf", "--window", "64"),
        *("--concurrency", "2", "--repetitions", "2"),
    )
    problems = bench.document["problems"]
    assert [problem["repetition"] for problem in problems] == [0, 1]
    assert {p["reason"] for p in problems} == {"out of memory (more in logs/hf.log)"}
    assert bench.saved == [0, 1, 2, 3]
    text = capsys.readouterr().out
    assert "hf, window 64, 2 streams, repetition 1 failed: out of memory" in text


def test_nothing_measured_leaves_no_older_file(bench: Bench) -> None:
    (bench.folder / "streams.json").write_text('{"measurements": [1], "problems": []}')
    bench.messages["hf", 64] = {"failed": "no memory"}
    arguments = ("--window", "64", "--concurrency", "2", "--repetitions", "1")
    with pytest.raises(SystemExit, match="nothing was measured"):
        bench.run("--peers", "hf", *arguments)
    document = bench.document
    assert document["measurements"] == document["summary"] == []
    assert [problem["reason"] for problem in document["problems"]] == ["no memory"]
