# SPDX-License-Identifier: Apache-2.0
"""``scripts/bench_endless.py`` on an engine that writes without a model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_endless as endless  # noqa: E402
from endless import series  # noqa: E402
from streams.engine import Delta  # noqa: E402

VOCAB = 50


class FakeEngine:
    """Writes a token a step to each request: its prompt's sum and the place."""

    def __init__(self, context: int = 1 << 40) -> None:
        self.context = context
        self.processes = {"front end": None}
        self.running: dict[str, tuple[list[int], int, int]] = {}
        self.added: list[tuple[str, int]] = []

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        most = min(max_tokens, self.context - len(prompt))
        self.running[name] = prompt, most, 0
        self.added.append((name, max_tokens))

    def step(self) -> Iterator[Delta]:
        for name, (prompt, most, written) in list(self.running.items()):
            finished = written + 1 == most
            self.running[name] = prompt, most, written + 1
            if finished:
                del self.running[name]
            token = (sum(prompt) + written) % VOCAB
            yield Delta(name, [token], finished, time.perf_counter())

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def memory(self) -> dict[str, int]:
        return {"front end": 1 << 20}

    def blocks(self) -> float:
        return 3.0

    def close(self) -> None:
        self.closed = True


def test_mixed_compares_all_texts() -> None:
    engine: Any = FakeEngine()
    prompt = [1, 2, 3]
    _, (alone,) = endless.run_streams(engine, [prompt], 500, "")
    series, found = endless.run_mixed(engine, prompt, 500, alone, VOCAB)
    assert len(series.seconds) == 500
    assert found["long_tokens_compared"] == 500
    assert found["long_first_difference"] is None
    assert found["short_requests"] > 30
    assert found["short_requests_that_differ"] == 0
    alone[77] += 1
    _, found = endless.run_mixed(engine, prompt, 500, alone, VOCAB)
    assert found["long_first_difference"] == 77


def test_mixed_ends_with_a_stream_that_the_context_ends() -> None:
    engine: Any = FakeEngine(context=400)
    _, found = endless.run_mixed(engine, [1, 2, 3], 5000, [], VOCAB)
    assert not engine.busy
    assert found["long_tokens_compared"] == 0
    assert found["short_requests_that_differ"] == 0


CONTEXT = 64
LONG_ENOUGH = CONTEXT + endless.CHUNK + 100


@pytest.mark.parametrize("scenarios", [["mixed"], ["decode", "mixed"]])
def test_mixed_is_never_compared_with_nothing(
    scenarios: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stream writes alone once, for ``decode`` where that is wanted."""
    engine = FakeEngine()

    monkeypatch.setattr(endless, "Engine", lambda *args: engine)
    monkeypatch.setattr(series, "MEMORY_SECONDS", 0.0)
    config = {"max_position_embeddings": CONTEXT}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lengths = ["--decode-tokens", str(LONG_ENOUGH), "--mixed-tokens", str(LONG_ENOUGH)]
    args = endless.parse_arguments(["--scenarios", *scenarios, *lengths])
    saved: list[Any] = []
    endless.run_model(str(tmp_path), VOCAB, args, saved.append)
    summary = saved[-1]["scenarios"]["mixed"]["summary"]
    assert engine.closed
    assert list(saved[-1]["scenarios"]) == scenarios
    assert summary["long_tokens_compared"] == LONG_ENOUGH
    assert summary["long_first_difference"] is None
    long = [name for name, tokens in engine.added if tokens == LONG_ENOUGH]
    assert long == ["0", "long"]


def test_lengths_fit_into_stock_vllm() -> None:
    args = endless.parse_arguments([])
    assert {option: getattr(args, option) for option in endless.LENGTHS} == (
        endless.LENGTHS
    )
    args = endless.parse_arguments(["--stock", "12000", "--mixed-tokens", "9000"])
    assert args.scenarios == ["prefill", "decode", "side-by-side", "mixed"]
    assert args.prefill_tokens == 11_999
    assert args.decode_tokens == 12_000 - endless.BEGINNING
    assert args.stream_tokens == endless.LENGTHS["stream_tokens"]
    assert args.mixed_tokens == 9000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill-tokens", "12000"], "--prefill-tokens must be at most 11999"),
        (["--decode-tokens", "11937"], "--decode-tokens must be at most 11936"),
        (["--scenarios", "paired"], "every scenario but paired"),
    ],
)
def test_what_stock_vllm_cannot_hold_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        endless.parse_arguments(["--stock", "12000", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_within_the_window_is_refused(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = endless.parse_arguments(["--stock", "12000", "--scenarios", "prefill"])
    message = "--prefill-tokens must be above 23040, --stock above 23104"
    with pytest.raises(SystemExit, match=message):
        endless.run_model(str(tmp_path), VOCAB, args, print)
