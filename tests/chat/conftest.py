# SPDX-License-Identifier: Apache-2.0
"""One server for all tests of this folder, with all that a chat client may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.chat.api import ADAPTER, BASE, BLOCK, WINDOW
from tests.chat.models import make_adapter, make_chat_model
from tests.engines import vllm_since
from tests.servers import running_server

FLAGS = (
    f"--served-model-name {BASE} --dtype float32 --enforce-eager "
    f"--max-model-len {WINDOW} --block-size {BLOCK} --enable-prompt-tokens-details "
    "--enable-auto-tool-choice --tool-call-parser hermes "
    "--reasoning-parser deepseek_v3 "
    "--structured-outputs-config.enable_in_reasoning True "
    "--structured-outputs-config.backend xgrammar "
    "--structured-outputs-config.disable_any_whitespace True "
    "--enable-lora --max-lora-rank 8"
)
if vllm_since("0.30.0"):  # 0.29 has these endpoints always
    FLAGS += " --enable-scale-out"


@pytest.fixture(scope="package")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter's folder."""
    return make_adapter(tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[str]:
    """The server's base URL."""
    folder = tmp_path_factory.mktemp("chat")
    model = make_chat_model(folder / "model")
    flags = f"{FLAGS} --lora-modules {ADAPTER}={adapter}"
    environment = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with running_server(folder / "log", flags, model, environment) as url:
        yield url


@pytest.fixture(scope="package")
def client(server: str) -> openai.OpenAI:
    """A client of the server."""
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)
