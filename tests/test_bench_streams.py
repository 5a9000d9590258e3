# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark: its peers compute what they say, its figures are right."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engines import GOLDEN, engine, first_near_tie, make_llama, worst

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from streams import plan, result, summary  # noqa: E402
from streams.engine import Requests  # noqa: E402
from streams.launch import engine_environment, measure  # noqa: E402
from streams.peers.hf import SinkLlama  # noqa: E402
from streams.peers.recompute import recompute  # noqa: E402
from streams.plots import plot_all  # noqa: E402
from streams.result import Recorder, Result  # noqa: E402
from streams.workload import Workload  # noqa: E402

LOSS_TOLERANCE = 1e-3


def tiny(model: Path | str = "", **changes: Any) -> Workload:
    settings: dict[str, Any] = {
        "peer": "hf",
        "model": str(model),
        "streams": 2,
        "window": 48,
        "sink_tokens": 4,
        "prompt_tokens": 32,
        "text_tokens": 96,
    }
    return Workload(**(settings | changes))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text())


# The Hugging Face loop.


def hf_loop(batch: int, sinks: tuple[int, int]) -> SinkLlama:
    model = LlamaForCausalLM.from_pretrained(GOLDEN).float().eval()
    return SinkLlama(model, batch, *sinks)


@pytest.mark.parametrize("sinks", [(4, 60), (0, 64), (16, 112)], ids=str)
@pytest.mark.parametrize("prompt", [1, 30, 200])
def test_hf_losses_are_those_of_the_2023_code(
    golden: dict[str, Any], sinks: tuple[int, int], prompt: int
) -> None:
    """Beside a stream of another text; the prompt in one pass as far as it fits."""
    ids = golden["ids"][:400]
    texts = torch.tensor([ids, ids[::-1]])
    loop = hf_loop(2, sinks)
    losses = []
    for position in range(prompt, len(ids)):
        part = texts[:, position - 1 : position] if losses else texts[:, :prompt]
        scores = loop.read(part)[0].double().log_softmax(-1)
        losses.append(-float(scores[ids[position]]))
    reference = golden["res"][f"{sinks[0]}+{sinks[1]}"]["nll"]
    assert worst(losses, reference[prompt - 1 : len(ids) - 1]) < LOSS_TOLERANCE


def test_hf_greedy_tokens_are_those_of_the_2023_code(golden: dict[str, Any]) -> None:
    reference = golden["res"]["greedy_4+60"]
    loop = hf_loop(1, (4, 60))
    tokens = torch.tensor([golden["ids"][: reference["prompt_len"]]])
    written = []
    tie = first_near_tie(reference["top2_gap"])
    for _ in range(tie):
        tokens = loop.read(tokens).argmax(-1, keepdim=True)
        written.append(int(tokens))
    assert tie > 40
    assert written == reference["tokens"][:tie]


# Recomputation.


@pytest.mark.slow
def test_recomputation_is_a_dense_pass_over_the_window(tmp_path: Path) -> None:
    model = make_llama(tmp_path)
    workload = tiny(tmp_path, streams=3, window=24, prompt_tokens=24, text_tokens=34)
    texts = workload.prompts()
    expected = [list(text) for text in texts]
    for text in expected:
        for _ in range(workload.output_tokens):
            with torch.inference_mode():
                logits = model(torch.tensor([text[-24:]])).logits[0, -1]
            best = logits.log_softmax(-1).topk(2).values
            assert best[0] - best[1] > 1e-3, "a near tie decides nothing"
            text.append(int(logits.argmax()))
    with engine(tmp_path, None, enable_prefix_caching=False) as llm:
        recorder = Recorder(3, 24, lambda tokens: None)
        recompute(Requests(llm.llm_engine), texts, workload, recorder)
    assert texts == expected
    assert [recorder.written(stream) for stream in range(3)] == [10, 10, 10]


def test_recomputation_stops_after_its_time() -> None:
    """It then has a first token and two more of every stream."""

    class Instant:
        def __init__(self) -> None:
            self.asked: list[tuple[str, list[int]]] = []

        def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
            assert max_tokens == 1
            self.asked.append((name, prompt))

        @property
        def busy(self) -> bool:
            return bool(self.asked)

        def step(self) -> Iterator[Any]:
            from streams.engine import Delta

            name, prompt = self.asked.pop(0)
            yield Delta(name, [sum(prompt) % 7], True, time.perf_counter())

    workload = tiny(window=4, text_tokens=1000, seconds=1e-9)
    texts = [[1, 2, 3, 4], [5, 6, 7, 8]]
    recompute(Instant(), texts, workload, Recorder(2, 4, lambda tokens: None))
    # 1+2+3+4 = 10, then 2+3+4+3 = 12, then 3+4+3+5 = 15, all modulo 7
    assert texts[0] == [1, 2, 3, 4, 3, 5, 1]
    assert [len(text) for text in texts] == [7, 7]


# Figures.


def recorded(
    monkeypatch: pytest.MonkeyPatch,
    times: list[list[float]],
    wanted: int = 0,
    extrapolate: bool = False,
) -> Result:
    """A result of streams with prompts of 10 tokens that wrote at ``times``."""
    now = 100.0
    monkeypatch.setattr(result.time, "perf_counter", lambda: now)
    recorder = Recorder(len(times), 10, lambda tokens: None)
    for moment, stream in sorted((t, s) for s, row in enumerate(times) for t in row):
        now = 100.0 + moment
        recorder.wrote(stream)
    wanted = wanted or max(map(len, times))
    return recorder.result(wanted, extrapolate, peak_rss_bytes=1)


def test_figures_are_those_of_vllm_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    times = [[1.0, 1.5, 2.5, 2.75], [2.0, 2.25, 4.0], [0.5, 0.75, 0.8, 3.0]]
    ours = recorded(monkeypatch, times).to_json()
    outputs = [
        RequestFuncOutput(
            success=True,
            latency=row[-1],
            output_tokens=len(row),
            ttft=row[0],
            itl=[b - a for a, b in zip(row, row[1:], strict=False)],
            prompt_len=10,
        )
        for row in times
    ]
    requests = [SampleRequest("", 10, 4) for _ in times]
    theirs, _ = calculate_metrics(requests, outputs, 4.0, None, [99.0], {})
    assert ours["duration"] == 4.0
    assert ours["total_input_tokens"] == theirs.total_input
    assert ours["total_output_tokens"] == theirs.total_output
    for key in ("output_throughput", "total_token_throughput"):
        assert ours[key] == pytest.approx(getattr(theirs, key))
    for name in ("ttft", "tpot", "itl"):
        for kind in ("mean", "median", "std"):
            key = f"{kind}_{name}_ms"
            assert ours[key] == pytest.approx(getattr(theirs, key)), key
        ((_, p99),) = getattr(theirs, f"percentiles_{name}_ms")
        assert ours[f"p99_{name}_ms"] == pytest.approx(p99)


def test_steady_throughput_is_that_of_all_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the last first token and the first last token."""
    both = recorded(monkeypatch, [[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 9.0]])
    # From 2 to 4: two tokens of the first stream, two of the second.
    assert both.steady_output_throughput == pytest.approx(4 / 2)
    one_by_one = recorded(monkeypatch, [[1.0, 2.0], [3.0, 4.0]])
    assert one_by_one.steady_output_throughput is None
    assert one_by_one.longest_text == 12
    assert one_by_one.output_throughput == pytest.approx(4 / 4)


def test_a_cut_run_is_judged_by_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures are those of the run to the end, but for what it wrote."""
    gap, wanted = 0.25, 100  # a prompt of 4 seconds, then both streams every 0.25
    whole = [[4 + gap * i for i in range(wanted)]] * 2
    end = recorded(monkeypatch, whole, extrapolate=True).to_json()
    cut = recorded(monkeypatch, [t[:9] for t in whole], wanted, True).to_json()
    for key in ("output_throughput", "total_token_throughput", "request_throughput"):
        assert cut[key] == pytest.approx(end[key]), key
    key = "steady_output_throughput"
    assert cut[key] == pytest.approx(2 / gap) == pytest.approx(end[key])
    assert (end["extrapolated"], end["estimated_duration"]) == (False, None)
    assert end["measured_output_throughput"] == end["output_throughput"]
    assert cut["extrapolated"] and cut["completed"] == 0
    assert cut["estimated_duration"] == pytest.approx(end["duration"])
    assert (cut["duration"], cut["total_output_tokens"]) == (6.0, 18)
    assert cut["measured_output_throughput"] == pytest.approx(18 / 6)


def test_a_cut_run_of_streams_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As re-computation writes: the first stream is ahead when the last one begins."""
    times = [[1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0]]
    cut = recorded(monkeypatch, times, 50, True)
    assert cut.whole == (100.0, 2, 100)
    assert cut.output_throughput == pytest.approx(1.0)


def test_a_run_ended_by_its_context_is_not_extrapolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = recorded(monkeypatch, [[1.0, 2.0, 4.0]], wanted=10)
    assert not short.to_json()["extrapolated"]
    assert short.output_throughput == pytest.approx(3 / 4)


def test_too_few_tokens_give_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="side by side"):
        recorded(monkeypatch, [[1.0, 2.0], [3.0]], 10, True)


def test_the_limit_counts_from_the_last_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 50.0
    monkeypatch.setattr(result.time, "perf_counter", lambda: now)
    recorder = Recorder(2, 10, lambda tokens: None)
    now = 80.0
    recorder.wrote(0)
    assert recorder.writing_seconds == 0
    now = 90.0
    recorder.wrote(1, 2, moment=89.0)
    recorder.wrote(0)
    assert recorder.writing_seconds == pytest.approx(1.0)
    assert list(recorder.times[1]) == [89.0, 89.0]


def test_time_per_token_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap before the token that makes the text ``n`` long stands at ``n``."""
    growing = [0.0]
    for gap in range(1, 400):
        growing.append(growing[-1] + gap)
    text = recorded(monkeypatch, [growing]).text
    assert len(text["itl_ms"]) == result.TEXT_BINS
    for length, milliseconds in zip(text["text_tokens"], text["itl_ms"], strict=True):
        assert milliseconds == pytest.approx(1e3 * (length - 11), abs=1e3)


def rows() -> list[dict[str, Any]]:
    found = []
    for repetition, scale in enumerate((1.0, 3.0, 2.0)):
        for peer, rate in (("sink_paged", 240.0), ("recompute", 10.0)):
            cut = peer == "recompute"
            found.append(
                {
                    "peer": peer,
                    "window": 512,
                    "streams": 8,
                    "repetition": repetition,
                    "output_throughput": (20.0 if cut else 100.0) * scale,
                    "steady_output_throughput": rate * scale,
                    "extrapolated": cut,
                    "completed": 0 if cut else 8,
                    "median_itl_ms": 8e3 / rate / scale,
                    "p99_itl_ms": 50.0,
                    "median_ttft_ms": 5.0,
                    "num_preemptions": 2,
                    "kv_blocks_peak": 17,
                    "kv_blocks": 127,
                    "peak_rss_bytes": 2**30,
                    "longest_text": 4096,
                    "itl_by_text": {"text_tokens": [1.0, 2.0], "itl_ms": [3.0, 4.0]},
                }
            )
    return found


def test_summary_table_and_plots(tmp_path: Path) -> None:
    medians = summary.summarise(rows())
    assert [row["peer"] for row in medians] == ["sink_paged", "recompute"]
    assert medians[0]["output_throughput"] == 200.0
    assert medians[0]["output_throughput_min_max"] == [100.0, 300.0]
    assert summary.speedups(medians, "recompute") == {(512, 8): pytest.approx(24.0)}
    (line,) = summary.speedup_lines(medians)
    assert "over recompute, window 512, 8 streams: 24x while all write, 5x" in line
    lines = summary.table(medians).splitlines()
    assert lines[2].endswith(" whole") and lines[3].endswith(" cut")
    assert [line for line in lines if line.startswith(("cut: ", "short: "))] == [
        "cut: stopped after --seconds; its output tok/s is estimated for whole texts"
    ]
    assert "100-300" in lines[2] and "17/127" in lines[2] and "1024" in lines[2]
    files = plot_all(medians, rows(), tmp_path)
    names = [file.name for file in files]
    assert names == ["throughput.png", "time_per_token.png", "speedup.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_streams_that_wait_have_no_speedup_while_all_write() -> None:
    """Theirs is over whole texts alone; a stock engine's short texts are marked."""
    measured = rows()
    for one in measured:
        one["steady_output_throughput"] = None
        one |= {"extrapolated": False, "completed": 3}
    medians = summary.summarise(measured)
    assert summary.speedups(medians, "recompute") == {}
    (line,) = summary.speedup_lines(medians)
    assert line.endswith("8 streams: 5x over whole texts")
    assert summary.table(medians).splitlines()[2].endswith(" short")


def test_kv_bytes(tmp_path: Path) -> None:
    make_llama(tmp_path)  # 3 layers, 2 KV heads of 32
    assert tiny(tmp_path).kv_bytes_per_token == 2 * 3 * 2 * 32 * 4
    assert tiny(tmp_path, dtype="bfloat16").kv_bytes_per_token == 2 * 3 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sink_tokens": 64}, "must be above --sink-tokens 64"),
        ({"length_windows": 1.0}, "raise --length-windows"),
        ({"kv_windows": 1.0}, "at least 2"),
        ({"concurrency": [0]}, "at least 1"),
        ({}, None),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], words: str | None) -> None:
    settings = {
        "window": [64],
        "sink_tokens": 4,
        "prompt_tokens": None,
        "length_windows": 4.0,
        "kv_windows": 0.0,
        "concurrency": [1],
    }
    problem = plan.check(argparse.Namespace(**(settings | changes)))
    assert problem is None if words is None else words in str(problem)


def test_a_chunk_fits_into_the_pool_beside_a_window() -> None:
    for window in (128, 256, 512, 2048):
        for kv_windows in (2.0, 3.0, 8.0, 64.0):
            for in_flight in (1, 2):
                chunk = plan.batched_tokens(window, kv_windows, in_flight)
                assert in_flight * chunk + window <= kv_windows * window


# Processes.


def test_the_environment_is_the_same_for_all_peers() -> None:
    """The user's settings come first, less what would change the workload."""
    given = {"OMP_NUM_THREADS": "7", "VLLM_CPU_KVCACHE_SPACE": "1", "HOME": "/home/a"}
    environment = engine_environment(given | {"PYTHONPATH": "/of/the/user"})
    assert environment["PYTHONPATH"].split(os.pathsep)[1:] == ["/of/the/user"]
    assert os.pathsep not in engine_environment(given)["PYTHONPATH"]
    assert environment["OMP_NUM_THREADS"] == "7" and environment["HOME"] == "/home/a"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


def test_a_failure_is_reported(tmp_path: Path) -> None:
    message = measure(tiny(tmp_path / "nowhere"), tmp_path / "log")
    assert "nowhere" in message["failed"] and "log" in message["failed"]
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_dead_process_is_reported(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no memory left\nkill -9 $$\n")
    python.chmod(0o755)
    message = measure(tiny(tmp_path), tmp_path / "log", str(python))
    assert "SIGKILL" in message["failed"] and "no memory left" in message["failed"]


def test_a_missing_interpreter_is_reported(tmp_path: Path) -> None:
    message = measure(tiny(tmp_path), tmp_path / "log", str(tmp_path / "python"))
    reason = "python does not run: No such file or directory"
    assert message == {"skipped": reason, "everywhere": True}


@pytest.mark.slow
def test_script(tmp_path: Path) -> None:
    """Texts of 288 tokens, a context of 256, a pool of 6 windows of 96 tokens."""
    model = tmp_path / "model"
    make_llama(model)
    command = [
        *(sys.executable, SCRIPTS / "bench_streams.py", "--model", model, "--eager"),
        *("--peers", "sink_paged", "vllm", "hf", "openvino", "--concurrency", "4"),
        *("--window", "96", "--length-windows", "3", "--kv-windows", "6"),
        *("--repetitions", "1", "--output-dir", tmp_path / "out"),
        *("--openvino-python", sys.executable),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "openvino skipped: " in done.stdout
    assert "has no module openvino_genai" in done.stdout
    document = json.loads((tmp_path / "out" / "streams.json").read_text())
    assert document["provenance"]["vllm"]
    ours, stock, loop = document["measurements"]
    for one in (ours, stock, loop):
        wanted = min(288, one["longest_text"]) - 96
        assert one["total_output_tokens"] == 4 * wanted
        assert one["total_input_tokens"] == 4 * 96
        assert 0 < one["median_itl_ms"] <= one["p99_itl_ms"]
        assert one["median_ttft_ms"] > 0
        assert 2**26 < one["peak_rss_bytes"] < 2**34
    assert ours["completed"] == loop["completed"] == 4
    assert ours["longest_text"] == loop["longest_text"] == 288
    assert ours["kv_blocks_peak"] <= ours["kv_blocks"] == stock["kv_blocks"] == 17
    assert stock["completed"] == 0 and stock["longest_text"] == 256
    assert stock["num_preemptions"] > 0 and stock["kv_blocks_peak"] > 12
    for name in ("throughput", "time_per_token"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
