# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --sink-eviction`` on the bundled model, through a real client."""

from __future__ import annotations

import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.servers import MODEL, running_server

RESIDENT = 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's base URL; vLLM's defaults: compiled, cached, own processes."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, f"--max-model-len {RESIDENT}") as url:
        yield url


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)


def kv_usage(url: str) -> float:
    metrics = httpx.get(f"{url}/metrics").text
    found = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found.group(1))


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    options = {"temperature": 0} | options
    return client.completions.create(model=str(MODEL), prompt=prompt, **options)


def test_streams_far_past_the_context(client: openai.OpenAI, server: str) -> None:
    """A prompt and an output, each many windows long, as streamed text."""
    prompt = Path(tarfile.__file__).read_text()[:5000]  # never trained on
    stream = complete(
        client,
        prompt,
        max_tokens=2000,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, usage = "", None
    for event in stream:
        text += "".join(choice.text for choice in event.choices)
        usage = event.usage or usage
    assert usage is not None
    assert usage.prompt_tokens == len(prompt.encode()) + 1
    assert usage.completion_tokens == 2000
    printable = sum(c.isprintable() or c in "\n\t" for c in text)
    assert len(text) > 1500
    assert printable > 0.95 * len(text), "the output is not text"
    deadline = time.monotonic() + 20
    while kv_usage(server) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert kv_usage(server) == 0


def test_wrong_requests_get_an_error_and_the_server_goes_on(
    client: openai.OpenAI,
) -> None:
    for options in (
        {"max_tokens": -1},
        {"max_tokens": 2**40},
        {"temperature": -2.0},
        {"logprobs": 10_000},
    ):
        with pytest.raises(openai.BadRequestError):
            complete(client, "x = 1\n", **options)
    assert complete(client, "x = 1\n", max_tokens=3).usage.completion_tokens == 3
