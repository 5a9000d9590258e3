# SPDX-License-Identifier: Apache-2.0
"""A model's layers split over two workers, and two engines behind two API servers."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engines import (
    GOLDEN,
    SHARED_NUMA_NODE,
    engine,
    first_near_tie,
    generate,
    greedy,
    prompt_losses,
    worst,
)
from tests.servers import MODEL, running_server

pytestmark = pytest.mark.slow


def test_tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and tokens of the 2023 code; each rank proves its heads' rotations."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    golden: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
    reference = golden["res"]["greedy_4+60"]
    prompt = golden["ids"][: reference["prompt_len"]]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(GOLDEN, (4, 60), **options) as llm:
        read, written = generate(
            llm, [golden["ids"], prompt], [greedy(1, prompt_logprobs=0), greedy(400)]
        )
    assert worst(prompt_losses(read), golden["res"]["4+60"]["nll"]) < 1e-3
    tie = first_near_tie(reference["top2_gap"])
    assert list(written.outputs[0].token_ids)[:tie] == reference["tokens"][:tie]


def test_data_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines serve, and each request has the tokens that it has alone."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv(*SHARED_NUMA_NODE)
    flags = "--data-parallel-size 2 --api-server-count 2 --max-model-len 128"
    flags += " --enforce-eager"
    prompts = [f"def number_{i}():\n    return " * 12 for i in range(8)]
    with running_server(tmp_path / "log", flags) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=240)

        def complete(prompt: str) -> str:
            answer = client.completions.create(
                model=str(MODEL),
                prompt=prompt,
                max_tokens=200,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(len(prompts)) as clients:
            together = list(clients.map(complete, prompts))
        assert together == list(map(complete, prompts))
        metrics = httpx.get(f"{url}/metrics").text
    evicted = re.findall(
        r'^vllm:sink_paged_tokens_evicted_total\{engine="(\d)".*\} (\S+)$',
        metrics,
        re.MULTILINE,
    )
    assert {engine for engine, _ in evicted} == {"0", "1"}
    assert all(float(count) > 0 for _, count in evicted)
