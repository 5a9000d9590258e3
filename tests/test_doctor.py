# SPDX-License-Identifier: Apache-2.0
"""``sink-paged doctor`` says what the engine then does, and refuses what it refuses."""

import re
from pathlib import Path

import pytest

from sink_paged import doctor
from tests.engines import core, engine

POCKET = Path(__file__).parents[1] / "models" / "pocket"
ARGUMENTS = ["--model", str(POCKET), "--dtype", "float32", "--block-size", "16"]


@pytest.mark.slow
def test_bound_and_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    """A stream's blocks, and the streams in the pool, as an engine has them."""
    memory = 16 << 20
    given = ["--sink-window", "100", "--max-num-batched-tokens", "256"]
    code = doctor.main(
        ["doctor", *ARGUMENTS, *given, "--kv-cache-memory-bytes", str(memory)]
    )
    said = capsys.readouterr().out
    assert code == 0
    held, decoding, streams = (
        int(re.search(pattern, said)[1])  # type: ignore[index]
        for pattern in (
            r"at most (\d+) blocks of 16",
            r"(\d+) while it only",
            r"(\d+) streams",
        )
    )
    assert "cache config     4+100 (105 tokens" in said
    with engine(
        POCKET,
        (4, 100),
        block_size=16,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=memory,
    ) as llm:
        config = core(llm).scheduler.kv_cache_config
        (group,) = config.kv_cache_groups
        policy = group.kv_cache_spec.blocks
        in_flight = llm.llm_engine.vllm_config.max_in_flight_tokens
    assert held == policy.max_blocks(in_flight)
    assert decoding == policy.max_blocks(1)
    assert streams == config.num_blocks // decoding


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sink-window", "600"], "window_tokens must be in"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        (["--kv-cache-memory-bytes", "100K"], "KV cache does not hold a stream"),
    ],
)
def test_refusals(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason of the engine, and an exit status."""
    assert doctor.main(["doctor", *ARGUMENTS, *arguments]) == 1
    (refusal,) = re.findall("(?m)^refused .*", capsys.readouterr().out)
    assert reason in refusal


def test_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model: versions and hooks; an unknown vLLM is refused."""
    assert doctor.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "platform         cpu" in said
    assert "EngineArgs.create_engine_config" in said
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert doctor.main(["doctor"]) == 1
    assert "does not support vLLM 0.99.0" in capsys.readouterr().out
