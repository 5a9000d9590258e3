# SPDX-License-Identifier: Apache-2.0
"""The metrics of an engine whose every number is known, and the dashboard on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM
from vllm.v1.metrics.reader import get_metrics_snapshot

from sink_paged.window import SinkWindow
from tests.engines import GOLDEN, engine, forget, generate, greedy

WINDOW = SinkWindow(4, 60)
BLOCK = 32
PROMPT = [256, *range(1, 40)]
DASHBOARD = Path(__file__).parents[1] / "scripts" / "grafana" / "sink_paged.json"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    sinks = WINDOW.sink_tokens, WINDOW.window_tokens
    with engine(GOLDEN, sinks, block_size=BLOCK, disable_log_stats=False) as llm:
        yield llm


def metrics() -> dict[str, float]:
    """By what comes behind ``vllm:sink_paged_``."""
    prefix = "vllm:sink_paged_"
    return {
        metric.name.removeprefix(prefix): metric.value
        for metric in get_metrics_snapshot()
        if metric.name.startswith(prefix)
    }


IDLE = {"blocks_pinned": 0, "streams_past_window": 0, "resident_tokens": 0}


def test_every_step_of_a_stream(llm: LLM) -> None:
    """In each step the text's last token is read, the ones before have been."""
    forget(llm)
    params = greedy(150)
    llm.llm_engine.add_request("0", {"prompt_token_ids": PROMPT}, params)
    first = metrics()
    for step in range(150):
        llm.llm_engine.step()
        read = len(PROMPT) - 1 + step if step else 0
        evicted = max(0, read - WINDOW.capacity)
        expired = max(0, read - WINDOW.window_tokens) // BLOCK
        now = metrics()
        assert now["tokens_evicted"] - first["tokens_evicted"] == evicted
        assert now["blocks_evicted"] - first["blocks_evicted"] == max(0, expired - 1), (
            "the first is pinned"
        )
        if step < 149:
            assert now["streams_past_window"] == (evicted > 0)
            assert now["resident_tokens"] == min(read, WINDOW.capacity)
            assert now["blocks_pinned"] == 1
    assert metrics().items() >= IDLE.items()


def test_streams_share_their_pinned_block(llm: LLM) -> None:
    """Found in the prefix cache: one block for all, nothing evicted by them."""
    text = [256, *(i * 7 % 251 for i in range(300))]
    generate(llm, [text], greedy(1))
    before = metrics()
    for number in range(3):
        prompt = {"prompt_token_ids": [*text, number]}
        llm.llm_engine.add_request(str(number), prompt, greedy(3))
    llm.llm_engine.step()
    llm.llm_engine.step()
    now = metrics()
    assert now["blocks_pinned"] == 1
    assert now["streams_past_window"] == 3
    assert now["resident_tokens"] == 3 * WINDOW.capacity
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    # Each resumes behind the hit, 288 tokens, and reads the 302 before its last two.
    assert metrics()["tokens_evicted"] - before["tokens_evicted"] == 3 * (303 - 288)
    assert metrics().items() >= IDLE.items()


def test_an_aborted_stream_is_no_longer_counted(llm: LLM) -> None:
    add = llm.llm_engine.add_request
    add("0", {"prompt_token_ids": PROMPT}, greedy(100))
    for _ in range(50):
        llm.llm_engine.step()
    assert metrics()["streams_past_window"] == 1
    llm.llm_engine.abort_request(["0"])
    add("1", {"prompt_token_ids": [7, 7, 7]}, greedy(3))
    llm.llm_engine.step()
    llm.llm_engine.step()
    now = metrics()
    assert now["streams_past_window"] == 0
    assert now["resident_tokens"] == 3
    llm.llm_engine.step()
    assert metrics().items() >= IDLE.items()


def test_the_dashboard_asks_for_what_there_is(llm: LLM) -> None:
    """Every metric of its panels is one of ours or of vLLM's."""
    names = {metric.name for metric in get_metrics_snapshot()}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"vllm:[a-z_]+", target["expr"])
    }
    assert {f"vllm:sink_paged_{name}" for name in IDLE} < asked
    suffix = re.compile("_(total|bucket|sum|count)$")
    assert {suffix.sub("", name) for name in asked} <= names
