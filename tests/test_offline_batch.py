# SPDX-License-Identifier: Apache-2.0
"""``sink_paged.offline`` and its script: resuming, bad lines, order, bounds.

All but the last test run against a fake engine; that one runs vLLM in a subprocess.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from sink_paged.offline import (
    Output,
    RefusedError,
    Request,
    RequestReader,
    Result,
    Tally,
    UnusableError,
    run,
    run_requests,
    sort_output,
)

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


batch = load_script("offline_batch")


class FakeEngine:
    """Answers a text prompt with its upper case; the shortest prompt finishes first."""

    def __init__(self, steps_before_crash: int | None = None) -> None:
        self.waiting: list[Request] = []
        self.submitted: list[Request] = []
        self.most_in_flight = 0
        self.steps_left = steps_before_crash

    @property
    def in_flight(self) -> int:
        return len(self.waiting)

    def submit(self, request: Request) -> None:
        if request.prompt == "refuse":
            raise RefusedError("token out of vocabulary")
        self.submitted.append(request)
        self.waiting.append(request)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def step(self) -> list[Result]:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise RuntimeError("engine died")
        request = min(self.waiting, key=lambda r: len(str(r.prompt)))
        self.waiting.remove(request)
        prompt = str(request.prompt)
        reason = "abort" if prompt == "abort" else "length"
        ids = list(range(len(prompt)))
        return [Result(request, prompt.upper(), ids, reason, len(prompt), 0)]


def encode(lines: Iterable[Any]) -> list[bytes]:
    return [
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
        for line in lines
    ]


def run_lines(
    lines: Iterable[Any],
    path: Path,
    engine: FakeEngine | None = None,
    *,
    in_flight: int = 4,
    keep_order: bool = False,
    stop: threading.Event | None = None,
) -> Tally:
    """One run over the input lines; returns its tally."""
    engine = engine or FakeEngine()
    with Output(path) as output, tqdm(file=io.StringIO()) as bar:
        reader, tally = RequestReader(encode(lines), output.done), Tally(bar)
        run(reader, lambda: engine, output, tally, in_flight=in_flight, stop=stop)
    if keep_order:
        sort_output(path, reader.line_of)
    return tally


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_record_fields(out: Path) -> None:
    tally = run_lines([{"prompt": "abc"}, {"id": "x", "prompt": "é\u2028"}], out)
    assert (tally.finished, tally.failed, tally.skipped) == (2, 0, 0)
    by_id = {r["id"]: r for r in records(out)}
    assert by_id[1] == {
        "id": 1,
        "line": 1,
        "text": "ABC",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "cached_tokens": 0,
    }
    assert by_id["x"]["text"] == "É\u2028"


def test_as_finished_and_in_input_order(out: Path) -> None:
    lines = [{"prompt": "a" * n} for n in (9, 5, 7, 1)]
    run_lines(lines, out)
    assert [r["line"] for r in records(out)] == [4, 2, 3, 1]
    out.unlink()
    run_lines(lines, out, keep_order=True)
    assert [r["line"] for r in records(out)] == [1, 2, 3, 4]


def test_blank_lines_are_no_lines_to_run(out: Path) -> None:
    tally = run_lines([b"\n", {"prompt": "a"}, b"  \n"], out)
    assert [r["line"] for r in records(out)] == [2]
    assert tally.failed == 0


def test_in_flight_is_bounded_and_input_is_read_lazily(out: Path) -> None:
    engine = FakeEngine()
    furthest_ahead = 0

    def lines() -> Iterable[bytes]:
        nonlocal furthest_ahead
        for n in range(50):
            written = len(records(out)) if out.exists() else 0
            furthest_ahead = max(furthest_ahead, n - written)
            yield json.dumps({"prompt": "a" * (50 - n)}).encode()

    with Output(out) as output, tqdm(file=io.StringIO()) as bar:
        reader = RequestReader(lines(), output.done)
        run(reader, lambda: engine, output, Tally(bar), in_flight=3)
    assert engine.most_in_flight == 3
    assert furthest_ahead <= 3
    assert len(records(out)) == 50


def test_an_engine_runs_one_sequence_after_another() -> None:
    engine = FakeEngine()
    for text in ("ab", "cd"):
        requests = [
            Request(n, n, "prompt", letter, {}) for n, letter in enumerate(text)
        ]
        steps = run_requests(requests, lambda: engine, in_flight=2)
        outcomes = [outcome for step in steps for outcome in step]
        assert [r.text for r in outcomes if isinstance(r, Result)] == list(text.upper())
        assert engine.in_flight == 0


def test_the_package_is_importable_without_vllm() -> None:
    code = "import sys, sink_paged.offline; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BAD_LINES = {
    "not JSON": b'{"prompt": \n',
    "not UTF-8": b'{"prompt": "\xff"}\n',
    "object is needed": [1, 2],
    "got none": {"id": 7},
    "got prompt, messages": {"prompt": "a", "messages": [{"role": "user"}]},
    "prompt must be text": {"prompt": 3},
    "list of token ids": {"prompt_token_ids": [1, -2]},
    "not empty": {"prompt_token_ids": []},
    "objects with a role": {"messages": ["hello"]},
    "id must be text or an integer": {"id": True, "prompt": "a"},
    "max_tokens must be an integer": {"prompt": "a", "max_tokens": 1.5},
    "max_tokens must be an integer from 1": {"prompt": "a", "max_tokens": 0},
    "temperature must be a number": {"prompt": "a", "temperature": "hot"},
    "seed must be": {"prompt": "a", "seed": 2**64},
    "ignore_eos must be": {"prompt": "a", "ignore_eos": 1},
    "stop must be": {"prompt": "a", "stop": [3]},
    "stop_token_ids must be": {"prompt": "a", "stop_token_ids": [True]},
    "out of vocabulary": {"prompt": "refuse"},
    "gave this request up": {"prompt": "abort"},
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_fails_alone(
    message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "before"}, BAD_LINES[message], {"prompt": "after"}]
    tally = run_lines(lines, out)
    assert (tally.finished, tally.failed) == (2, 1)
    (failure,) = (r for r in records(out) if "error" in r)
    assert failure["line"] == 2
    assert message in failure["error"]
    assert "line 2: " in capsys.readouterr().err
    assert {r.get("text") for r in records(out)} >= {"BEFORE", "AFTER"}


def test_nan_and_lone_surrogates_do_not_break_the_output(out: Path) -> None:
    lines = [
        b'{"prompt": "a", "temperature": NaN}\n',
        b'{"id": "\\ud800", "prompt": "b"}\n',
        b"[" * 100_000 + b"\n",
    ]
    tally = run_lines(lines, out, keep_order=True)
    assert (tally.finished, tally.failed) == (1, 2)
    assert records(out)[1]["id"] == "\ud800"
    assert run_lines(lines, out).skipped == 1


def test_unknown_keys_are_named_once(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a", "temprature": 1}, {"prompt": "b", "temprature": 1}]
    assert run_lines(lines, out).finished == 2
    assert capsys.readouterr().err.count("temprature") == 1


def test_duplicate_ids_are_errors_also_after_resuming(out: Path) -> None:
    lines = [
        {"id": "a", "prompt": "x"},
        {"id": "a", "prompt": "y"},
        {"id": 1, "prompt": "z"},
    ]
    for skipped in (0, 2):
        tally = run_lines(lines, out)
        assert (tally.failed, tally.skipped) == (1, skipped)
        failures = [r for r in records(out) if "error" in r]
        assert [(r["id"], r["line"]) for r in failures] == [("a", 2)]
        assert "first on line 1" in failures[0]["error"]
        assert sorted(r["text"] for r in records(out) if "text" in r) == ["X", "Z"]


def test_text_and_integer_ids_differ(out: Path) -> None:
    tally = run_lines([{"id": 2, "prompt": "x"}, {"id": "2", "prompt": "y"}], out)
    assert tally.finished == 2


def test_resume_runs_what_is_left_and_retries_failures(out: Path) -> None:
    lines: list[Any] = [{"id": n, "prompt": "a" * (n + 1)} for n in range(6)]
    lines[2] = {"id": 2, "prompt": "refuse"}
    with pytest.raises(RuntimeError, match="engine died"):
        run_lines(lines, out, FakeEngine(steps_before_crash=2))
    finished = [r["id"] for r in records(out) if "text" in r]
    assert len(finished) == 2
    lines[2] = {"id": 2, "prompt": "mended"}
    engine = FakeEngine()
    tally = run_lines(lines, out, engine, keep_order=True)
    assert (tally.finished, tally.failed, tally.skipped) == (4, 0, 2)
    assert not {request.id for request in engine.submitted} & set(finished)
    assert [r["id"] for r in records(out)] == list(range(6))


def test_a_finished_run_starts_no_engine(out: Path) -> None:
    lines = [{"prompt": "a"}]
    run_lines(lines, out)
    before = out.read_bytes()

    def start() -> FakeEngine:
        raise AssertionError("nothing to do")

    with Output(out) as output, tqdm(file=io.StringIO()) as bar:
        reader, tally = RequestReader(encode(lines), output.done), Tally(bar)
        run(reader, start, output, tally, in_flight=1)
    assert out.read_bytes() == before


def test_a_half_written_line_is_redone_wherever_it_was_cut(out: Path) -> None:
    lines = [{"id": "ä", "prompt": "a"}, {"id": "b", "prompt": "bb"}]
    run_lines(lines, out)
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        out.write_bytes(whole[:cut])
        tally = run_lines(lines, out)
        assert (tally.finished, tally.skipped) == (1, 1), cut
        assert out.read_bytes() == whole


def test_a_half_written_line_after_failures_is_cut_too(out: Path) -> None:
    lines = [{"prompt": "refuse"}, {"prompt": "b"}]
    run_lines(lines, out)
    with out.open("ab") as file:
        file.write(b'{"id": 9, "li')
    tally = run_lines(lines, out)
    assert (tally.failed, tally.skipped) == (1, 1)
    assert [r["line"] for r in records(out)] == [2, 1]


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b'{"id": 1}\n', b"\x00\n"])
def test_a_foreign_output_file_is_left_alone(content: bytes, out: Path) -> None:
    out.write_bytes(content)
    with pytest.raises(UnusableError, match="name another output"):
        run_lines([{"prompt": "a"}], out)
    assert out.read_bytes() == content


def test_order_follows_an_input_that_gained_lines(out: Path) -> None:
    lines = [{"id": n, "prompt": "a"} for n in "abc"]
    run_lines(lines, out)
    lines.insert(1, {"id": "new", "prompt": "a"})
    run_lines(lines, out, keep_order=True)
    assert [r["id"] for r in records(out)] == ["a", "new", "b", "c"]


def test_stop_keeps_what_is_finished(out: Path) -> None:
    stop = threading.Event()

    class StoppingEngine(FakeEngine):
        def step(self) -> list[Result]:
            stop.set()
            return super().step()

    lines = [{"prompt": "a" * n} for n in (3, 2, 1)]
    run_lines(lines, out, StoppingEngine(), stop=stop)
    assert [r["line"] for r in records(out)] == [3]
    run_lines(lines, out, keep_order=True)
    assert [r["line"] for r in records(out)] == [1, 2, 3]


def test_engine_settings_hold_only_what_was_given(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("")
    base = ["--model", "m", "--input", str(source), "--output", str(tmp_path / "o")]

    def settings(*more: str) -> Any:
        return batch.engine_settings(batch.parse_args([*base, *more]))

    assert settings("--stock") == {"model": "m", "max_num_seqs": 64}
    assert settings()["additional_config"] == {"sink_paged": {}}
    given = settings(
        *("--sink-tokens", "0", "--sink-window", "60", "--max-model-len", "64"),
        *("--engine-arg", "block-size=32", "--engine-arg", "kv_cache_dtype=fp8"),
        *("--engine-arg", 'additional_config={"other": 1}', "--batch-size", "2"),
    )
    assert given == {
        "model": "m",
        "max_num_seqs": 2,
        "max_model_len": 64,
        "block_size": 32,
        "kv_cache_dtype": "fp8",
        "additional_config": {
            "other": 1,
            "sink_paged": {"sink_tokens": 0, "window_tokens": 60},
        },
    }


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batch-size", "0"],
        ["--temperature", "3"],
        ["--max-tokens", "0"],
        ["--sink-window", "8"],
        ["--engine-arg", "block_size"],
        ["--input", "missing.jsonl"],
        ["--output", "missing/out.jsonl"],
    ],
)
def test_unusable_arguments_exit_with_2(wrong: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("")
    base = ["--model", "m", "--input", str(source), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as exit_info:
        batch.parse_args([*base, "--stock", *wrong])
    assert exit_info.value.code == 2


def run_script(folder: Path, *more: str, source: str = '{"prompt": "a"}') -> int:
    """The exit status of a run on a fake engine, or of its arguments."""
    (folder / "in.jsonl").write_text(source)
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    try:
        return batch.main(["--model", "m", *files, *more])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script starts ``FakeEngine`` and leaves the signals alone."""
    monkeypatch.setattr(batch, "start_vllm", lambda *args, **kwargs: FakeEngine())
    monkeypatch.setattr(batch, "stop_on_signals", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("fake_vllm")
def test_the_script_runs_a_file(tmp_path: Path) -> None:
    assert run_script(tmp_path, "--engine-arg", 'additional_config={"other": 1}') == 0
    assert [r["text"] for r in records(tmp_path / "out.jsonl")] == ["A"]
    assert run_script(tmp_path, source='{"id": 2, "prompt": "refuse"}') == 1


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["additional_config=foo"], "must be a JSON object, got 'foo'"),
        (["additional_config=[1]"], "must be a JSON object, got [1]"),
        (['additional_config={"sink_paged":5}'], "mapping of settings"),
        (['additional_config={"sink_paged":null}'], "mapping of settings"),
        (['additional_config={"sink_paged":{"sinks":1}}'], "unknown setting"),
        (["tensor_parallel_size=two", "--ray"], "must be an integer from 1"),
        (["pipeline_parallel_size=0", "--ray"], "must be an integer from 1"),
    ],
)
def test_unusable_engine_arguments_exit_with_2(
    wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(tmp_path, "--engine-arg", *wrong) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.usefixtures("fake_vllm")
def test_a_window_below_1_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(tmp_path, "--sink-window", "0") == 2
    assert "window_tokens must be in [1" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["--output", "/proc/out.jsonl"], "the output cannot be used"),
        (["--output", f"/tmp/{'a' * 300}.jsonl"], "File name too long"),
        (["--output", "/tmp"], "is not a regular file"),
        (["--input", "/proc/self/mem"], "/proc/self/mem cannot be read"),
    ],
)
def test_unusable_files_exit_with_2(
    files: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of root, whom permissions do not stop."""
    assert run_script(tmp_path, *files) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.usefixtures("fake_vllm")
def test_a_folder_that_cannot_be_written_exits_with_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch.os, "access", lambda *args: False)
    assert run_script(tmp_path) == 2
    assert "nothing may be written into" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_vllm")
def test_a_run_that_cannot_be_finished_exits_with_1(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is finished is kept, and the message says what to do."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch, "sort_output", full)
    assert run_script(tmp_path, "--keep-order") == 1
    message = "No space left on device; run again to resume"
    assert message in capsys.readouterr().err
    assert [r["text"] for r in records(tmp_path / "out.jsonl")] == ["A"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a trained length of 64 and the byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    pocket = load_script("train_pocket_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=pocket.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        bos_token_id=pocket.BOS,
        eos_token_id=pocket.EOS,
        pad_token_id=pocket.PAD,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    pocket.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_end_to_end_past_the_trained_length(tiny_model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[Any] = [
        {"id": "long", "prompt": "x = 1\n" * 60, "max_tokens": 100},
        {"id": "short", "prompt": "def f():", "max_tokens": 4},
        {"id": "ids", "prompt_token_ids": [256, 100, 101, 102]},
        {"id": "chat", "messages": [{"role": "user", "content": "hello"}]},
        {"id": "vocabulary", "prompt_token_ids": [256, 99999]},
        {"id": "surrogate", "prompt": "\ud800"},
        {"id": "nucleus", "prompt": "a", "top_p": 0},
        b"{not json}\n",
        {"id": "roles", "messages": [{"role": "user", "content": 5}]},
        {"id": "stop", "prompt": "a", "stop_token_ids": [99999]},
    ]
    source.write_bytes(b"".join(encode(lines)))
    command = [
        *(sys.executable, str(SCRIPTS / "offline_batch.py"), "--model", tiny_model),
        *(
            "--input",
            source,
            "--output",
            out,
            "--max-tokens",
            "8",
            "--temperature",
            "0",
        ),
        *("--dtype", "float32", "--enforce-eager", "--batch-size", "2", "--keep-order"),
        *("--token-ids", "--engine-arg", "block_size=32"),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The engine in a process of its own, as for users; other tests may set 0.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    process = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    by_id = {r["id"]: r for r in records(out)}
    assert [r["line"] for r in records(out)] == list(range(1, len(lines) + 1))
    tokens = {
        name: (r["prompt_tokens"], r["completion_tokens"])
        for name, r in by_id.items()
        if "text" in r
    }
    assert tokens.pop("chat")[1] == 8
    assert tokens == {"long": (361, 100), "short": (9, 4), "ids": (4, 8)}
    assert len(by_id["long"]["token_ids"]) == 100
    failed = {name for name, r in by_id.items() if "error" in r}
    assert failed == {"vocabulary", "surrogate", "nucleus", 8, "roles", "stop"}
    assert "line 8: not JSON" in process.stderr
