# SPDX-License-Identifier: Apache-2.0
"""``sink-paged doctor`` says what the engine then does, and refuses what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from sink_paged import doctor
from tests.engines import core, engine, make_llama

POCKET = Path(__file__).parents[1] / "models" / "pocket"
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
ARGUMENTS = ["--dtype", "float32", "--block-size", "16"]


def figures(said: str) -> tuple[int, int, int]:
    """Blocks of a stream, of one that decodes, and the streams that fit."""
    patterns = r"at most (\d+) blocks of 16", r"(\d+) while it only", r"(\d+) streams"
    held, decoding, streams = (re.search(pattern, said) for pattern in patterns)
    assert held and decoding and streams, said
    return int(held[1]), int(decoding[1]), int(streams[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "hybrid", "drafts"])
def test_bound_and_capacity(
    kind: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A stream's blocks, and the streams in the pool, as an engine has them.

    Also where every other layer has a sliding window of its own, in a cache of 8 bits,
    and with the layers of a draft model.
    """
    model = POCKET
    options: dict[str, Any] = {}
    if kind == "drafts":
        make_llama(tmp_path, max_position_embeddings=512)
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(tmp_path),
            "num_speculative_tokens": 20,
        }
    if kind == "hybrid":
        model = tmp_path
        options["kv_cache_dtype"] = "fp8"
        settings = dict(sliding_window=32, max_position_embeddings=512)
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**SHAPE, **settings, layer_types=kinds)
        Gemma3ForCausalLM(config).save_pretrained(model)
    memory = (2 if kind == "hybrid" else 8) << 20
    given = ["--sink-window", "100", "--max-num-batched-tokens", "256", "--port", "1"]
    size = ["--kv-cache-memory-bytes", str(memory), "--max-num-seqs", "256"]
    for name, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        size += [f"--{name.replace('_', '-')}", text]
    code = doctor.main(["doctor", str(model), *ARGUMENTS, *given, *size])
    said = capfd.readouterr().out
    assert code == 0, said
    assert "cache config     4+100 (105 tokens" in said
    with engine(
        model,
        (4, 100),
        block_size=16,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=memory,
        **options,
    ) as llm:
        pool = core(llm).scheduler.kv_cache_config
        config = llm.llm_engine.vllm_config
        policies = [group.kv_cache_spec.blocks for group in pool.kv_cache_groups]
        drafts = 20 * (kind == "drafts")  # slots, and tokens of a step
        held, decoding = (
            sum(policy.max_blocks(tokens + drafts) for policy in policies)
            for tokens in (config.max_in_flight_tokens, 1 + drafts)
        )
    assert len(policies) == (3 if kind == "hybrid" else 1)
    assert figures(said) == (held, decoding, (pool.num_blocks - 1) // decoding)


def test_arguments_as_vllm_serve_takes_them(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With underscores, with dots, from a file; others are an error."""
    dotted = ["--additional-config.sink_paged.sink_tokens", "2"]
    size = ["--kv_cache_memory_bytes", "8M", "--port", "1"]
    assert doctor.main(["doctor", str(POCKET), *ARGUMENTS, *dotted, *size]) == 0
    said = capfd.readouterr().out
    assert "cache config     2+509" in said
    assert "8 MiB on each worker (as given)" in said
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nadditional-config:\n  sink_paged:\n    sink_tokens: 3\n")
    assert doctor.main(["doctor", str(POCKET), "--config", str(file)]) == 0
    assert "cache config     3+508" in capfd.readouterr().out
    for wrong in (["doctor", str(POCKET), "--sink-widnow", "5"], ["nurse"]):
        with pytest.raises(SystemExit) as error:
            doctor.main(wrong)
        assert error.value.code == 2
    assert "no command nurse" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sink-window", "600"], "window_tokens must be in"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        (
            ["--kv-cache-memory-bytes", "100K"],
            "but a stream with cache config 4+507",
        ),
    ],
)
def test_refusals(
    arguments: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reason of the engine, and an exit status."""
    assert doctor.main(["doctor", "--model", str(POCKET), *ARGUMENTS, *arguments]) == 1
    (refusal,) = re.findall("(?m)^refused .*", capfd.readouterr().out)
    assert reason in refusal


def test_installation(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model: versions and hooks; an unknown vLLM is refused."""
    assert doctor.main(["doctor"]) == 0
    said = capfd.readouterr().out
    assert "platform         cpu" in said
    assert "EngineArgs.create_engine_config" in said
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert doctor.main(["doctor"]) == 1
    assert "does not support vLLM 0.99.0" in capfd.readouterr().out
