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
    flags = f"--max-model-len {RESIDENT} --enable-prompt-tokens-details"
    with running_server(log, flags) as url:
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


def test_resent_history_is_found_in_the_cache(client: openai.OpenAI) -> None:
    """A chat that resends a long history; each turn prefills only what is new."""
    history = [{"role": "user", "content": "import os\n" * 200}]
    cached = []
    for _ in range(3):
        answer = client.chat.completions.create(
            model=str(MODEL),
            messages=history,  # type: ignore[arg-type]
            max_tokens=40,
            temperature=0,
        )
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        cached.append(details.cached_tokens if details else 0)
        reply = answer.choices[0].message.content or ""
        history += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": "and then?"},
        ]
    assert cached[0] == 0
    assert cached[2] >= cached[1] > 1500


def test_no_max_tokens_is_no_endless_stream(client: openai.OpenAI) -> None:
    for length, most in ((20, RESIDENT - 21), (3 * RESIDENT, RESIDENT - 1)):
        answer = client.chat.completions.create(
            model=str(MODEL),
            messages=[{"role": "user", "content": "a" * (length - 1)}],
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        assert 0 < answer.usage.completion_tokens <= most


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


def test_seeded_sampling_of_a_long_prompt(client: openai.OpenAI) -> None:
    texts = {
        complete(client, "def f():\n" * 600, max_tokens=20, temperature=1.0, seed=3)
        .choices[0]
        .text
        for _ in range(2)
    }
    assert len(texts) == 1
