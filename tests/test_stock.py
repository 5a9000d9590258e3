# SPDX-License-Identifier: Apache-2.0
"""Without the flag vLLM behaves as if the package were not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engines import GOLDEN

RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
          kv_cache_memory_bytes=1 << 26, block_size=32)
prompts = [{"prompt_token_ids": [256] + [(i * k) % 251 for i in range(1, 30 * k)]}
           for k in range(1, 7)]
params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0,
                        detokenize=False)
outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
single = manager.coordinator.single_type_managers[0]
try:
    llm.generate({"prompt_token_ids": [5] * 256}, params, use_tqdm=False)
    refused = None
except VLLMValidationError as error:
    refused = str(error)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
config = llm.llm_engine.vllm_config
context = config.compilation_config.static_forward_context
print("RESULT", json.dumps({
    "tokens": [list(o.token_ids) for o in outputs],
    "logprobs": [o.cumulative_logprob for o in outputs],
    "blocks": manager.block_pool.num_gpu_blocks,
    "manager": type(single).__name__,
    "spec": type(single.kv_cache_spec).__name__,
    "backend": sorted({l.attn_backend.__name__ for l in context.values()}),
    "worker": config.parallel_config.worker_cls,
    "length": config.model_config.max_model_len,
    "refused": refused,
}))
"""


def run(plugins: str | None, tmp_path: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    done = subprocess.run(
        [sys.executable, "-c", RUN, GOLDEN],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def test_same_tokens_and_blocks_with_and_without_the_plugin(tmp_path: Path) -> None:
    loaded = run(None, tmp_path)
    absent = run("", tmp_path)
    assert loaded == absent
    assert loaded["manager"] == "FullAttentionManager"
    assert loaded["backend"] == ["CPUAttentionBackend"]
    assert "is longer than the maximum model length of 256" in loaded["refused"]
