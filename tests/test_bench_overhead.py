# SPDX-License-Identifier: Apache-2.0
"""The step-time benchmark without its engines: ratios, text lengths, what is saved."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_overhead as bench  # noqa: E402
from overhead import engines, settings  # noqa: E402
from overhead.compared import Row, compare, table  # noqa: E402

SETTINGS = settings.Settings(window=1024, streams=(1, 8), blocks=12, steps=16)


# Ratios.


def test_ratio_is_the_median_of_neighbouring_blocks() -> None:
    """A machine that slows down during both engines' blocks does not change it."""
    scales = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratios = [0.9, 0.8, 1.0, 0.85, 0.95]
    stock = [[0.010 * scale] * 3 for scale in scales]
    ours = [
        [0.010 * scale * ratio] * 3 for scale, ratio in zip(scales, ratios, strict=True)
    ]
    row = compare(ours, stock)
    assert row["block_ratios"] == pytest.approx(ratios)
    assert row["ratio"] == pytest.approx(0.9)
    assert row["ratio_quartiles"] == pytest.approx([0.85, 0.95])
    assert row["pooled_ratio"] == pytest.approx(1.0)
    assert (row["ours_ms"], row["stock_ms"]) == pytest.approx((40.0, 40.0))
    assert row["stock_block_ms"] == pytest.approx([10, 20, 40, 80, 160])


def test_the_ratio_lies_within_its_quartiles() -> None:
    """Where the quotient of the pooled medians does not."""
    ours = [[0.87] * 5 + [2.0] * 4, [0.9] * 9, [0.87] * 9]
    stock = [[0.98] * 9, [1.0] * 9, [0.99] * 9]
    row = compare(ours, stock)
    low, high = row["ratio_quartiles"]
    assert low <= row["ratio"] <= high
    assert row["ratio"] == statistics.median(row["block_ratios"])


def test_quartiles_of_two_blocks_are_between_them() -> None:
    row = compare([[0.9], [1.1]], [[1.0], [1.0]])
    assert row["ratio_quartiles"] == pytest.approx([0.95, 1.05])


def test_table_has_the_ratio_of_the_blocks() -> None:
    compared = compare([[0.9], [1.0], [1.1]], [[1.0], [1.0], [1.0]])
    lines = table([{"side": "past", "streams": 8} | compared]).splitlines()
    assert lines[1].split()[:2] == ["past", "8"]
    assert lines[1].endswith("1.000  0.950 - 1.050")


def test_who_begins_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(verb: str, connection: Any, steps: int) -> list[float]:
        asked.append(connection)
        return [1.0] * steps

    monkeypatch.setattr(engines, "command", answer)
    connections: dict[str, Any] = {"ours": "o", "stock": "s"}
    times = engines.in_turns(connections, 3, 2)
    assert "".join(asked) == "soosso"
    assert times == {"ours": [[1.0, 1.0]] * 3, "stock": [[1.0, 1.0]] * 3}


# Lengths of texts.


@pytest.mark.parametrize("streams", [1, 8, 32])
@pytest.mark.parametrize("window", [304, 1024, 4096])
def test_texts_keep_what_they_say(window: int, streams: int) -> None:
    """From the first block to the last."""
    short = replace(SETTINGS, window=window, streams=(streams,), blocks=8, steps=8)
    steps, settling = short.block_steps, short.settling_steps(streams)
    inside = short.text_lengths("inside", streams)
    assert inside["ours"] == inside["stock"]
    assert inside["ours"] + settling + steps <= window
    past = short.text_lengths("past", streams)
    assert past["ours"] > window
    # In the middle of the blocks, if the longest settling is needed.
    assert abs(past["stock"] + settling + steps / 2 - window) <= 1
    longest = max(inside["stock"], past["stock"]) + steps + 2 * settling
    assert longest <= short.longest_text


def test_settling_waits_for_all_prompts() -> None:
    """Prompts of two windows share steps of ``BATCHED_TOKENS``."""
    assert SETTINGS.settling_steps(1) == settings.SETTLING_STEPS + 1
    assert SETTINGS.settling_steps(32) == settings.SETTLING_STEPS + 32
    wide = replace(SETTINGS, window=4096)
    assert wide.settling_steps(8) == settings.SETTLING_STEPS + 32


def test_steps_of_all_blocks() -> None:
    few = replace(SETTINGS, blocks=3, steps=5, profile_steps=7)
    assert few.block_steps == 3 * (settings.UNTIMED_STEPS + 5) + 2 * 7


# What is saved.


def stop_after(
    number: int, stop: BaseException | None
) -> Callable[[str, settings.Settings, Path, Callable[[Row], object]], None]:
    """A ``measure`` that brings ``number`` cells, then ``stop``."""

    def measure(
        model: str,
        wanted: settings.Settings,
        output: Path,
        keep: Callable[[Row], object],
    ) -> None:
        for side, streams in bench.cells(wanted)[:number]:
            compared = compare([[0.9], [1.1]], [[1.0], [1.0]])
            keep({"side": side, "streams": streams} | compared)
        if stop:
            raise stop

    return measure


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (SystemExit("an engine ended"), "an engine ended\n3 of 4 cells were measured"),
        (KeyboardInterrupt(), "interrupted\n3 of 4 cells were measured"),
    ],
)
def test_what_was_measured_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
    words: str,
    capsys: Any,
) -> None:
    monkeypatch.setattr(bench, "measure", stop_after(3, stop))
    with pytest.raises(SystemExit, match=words):
        bench.measure_and_save("/home/a/llama", "/a/model", SETTINGS, tmp_path)
    document = json.loads((tmp_path / "overhead.json").read_text())
    found = [(cell["side"], cell["streams"]) for cell in document["cells"]]
    assert found == [("inside", 1), ("past", 1), ("inside", 8)]
    assert document["settings"]["model"] == "llama"
    assert "output_dir" not in document["settings"]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_an_older_file_stays_where_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "overhead.json").write_text("older")
    monkeypatch.setattr(bench, "measure", stop_after(0, SystemExit("no memory")))
    with pytest.raises(SystemExit, match="no memory\nno cell was measured"):
        bench.measure_and_save("m", "m", SETTINGS, tmp_path)
    assert (tmp_path / "overhead.json").read_text() == "older"


def test_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", stop_after(4, None))
    rows = bench.measure_and_save("m", "m", SETTINGS, tmp_path)
    document = json.loads((tmp_path / "overhead.json").read_text())
    assert document["cells"] == rows and len(rows) == 4
    assert document["provenance"]["sink_paged"]


def test_an_engine_that_ended_is_named() -> None:
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(SystemExit, match="an engine ended"):
        engines.command("run", ours, 4)
