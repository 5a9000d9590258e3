# SPDX-License-Identifier: Apache-2.0
"""Settings, flags, and what is refused before an engine starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from sink_paged import SinkConfig, platforms
from sink_paged import engine as engine_module
from sink_paged.config import MAX_STREAM_TOKENS, StreamConfig
from sink_paged.window import SinkWindow
from tests.engines import GOLDEN, engine

TRAINED = 256

load_general_plugins()  # registers a backend, once, which tests replace


def make_config(settings: Any, **options: Any) -> VllmConfig:
    """The engine config that ``LLM(additional_config=...)`` would run."""
    if settings is not None:
        options["additional_config"] = {"sink_paged": settings}
    options = {"model": str(GOLDEN), "skip_tokenizer_init": True} | options
    return AsyncEngineArgs(**options).create_engine_config()


def stream_of(config: VllmConfig) -> StreamConfig:
    stream = StreamConfig.load(config.additional_config)
    assert stream is not None
    return stream


def parse(*flags: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(GOLDEN), "--skip-tokenizer-init", *flags])
    return AsyncEngineArgs.from_cli_args(args)


def test_arguments_carry_what_the_flags_say() -> None:
    """To processes that read them before plugins are loaded: several API servers."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(GOLDEN), "--sink-eviction", "--sink-window", "50"]
    args = parser.parse_args(flags)
    AsyncEngineArgs.from_cli_args(args)
    assert args.additional_config == {"sink_paged": {"window_tokens": 50}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_tokens": -1}, r"sink_tokens must be in \[0, "),
        ({"sink_tokens": 1.5}, r"sink_tokens must be an integer in \[0, "),
        ({"sink_tokens": True}, "sink_tokens must be an integer"),
        ({"sink_tokens": "4"}, "sink_tokens must be an integer"),
        ({"window_tokens": 0}, r"window_tokens must be in \[1, "),
        ({"positions": "slots"}, "positions must be 'cache' or 'text', got 'slots'"),
        ({"window_tokens": -5}, r"window_tokens must be in \[1, "),
        ({"window_tokens": 2.0}, "window_tokens must be an integer"),
        (
            {"window": 5, "sinks": 4},
            "unknown setting .*: sinks, window; known settings",
        ),
        ([4, 60], "must be a mapping of settings"),
        (5, "must be a mapping of settings"),
        ({"window_tokens": 252}, r"= 257 is above 256.*must be in \[1, 251\], got 252"),
        ({"sink_tokens": 300}, "leaves no room for a window"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(settings)


def test_a_key_without_a_value_is_not_taken_for_off() -> None:
    arguments = AsyncEngineArgs(
        model=str(GOLDEN),
        skip_tokenizer_init=True,
        additional_config={"sink_paged": None},
    )
    with pytest.raises(ValueError, match="has no value"):
        arguments.create_engine_config()


def test_defaults_and_largest_window() -> None:
    for settings, expected in (
        ({}, (4, 251)),
        ({"sink_tokens": 0}, (0, 255)),
        ({"window_tokens": 100}, (4, 100)),
        ({"sink_tokens": 16, "window_tokens": 239}, (16, 239)),
    ):
        assert stream_of(make_config(settings)).window == SinkWindow(*expected)
    bounded = make_config({}, max_model_len=128)
    assert stream_of(bounded).window == SinkWindow(4, 123)
    with pytest.raises(ValueError, match=r"is above 128"):
        make_config({"window_tokens": 124}, max_model_len=128)


def test_distances_stay_within_the_trained_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert stream_of(make_config({}, max_model_len=999)).window == SinkWindow(4, 251)
    with pytest.raises(ValueError, match="is above 256"):
        make_config({"window_tokens": 252}, max_model_len=999)


def test_the_callers_dict_is_left_alone() -> None:
    mine = {"sink_paged": {"sink_tokens": 1}, "other": {"a": 1}}
    arguments = AsyncEngineArgs(
        model=str(GOLDEN), skip_tokenizer_init=True, additional_config=mine
    )
    config = arguments.create_engine_config()
    assert mine == {"sink_paged": {"sink_tokens": 1}, "other": {"a": 1}}
    assert config.additional_config["other"] == {"a": 1}


def test_streams_are_as_long_as_int32_counts() -> None:
    config = make_config({}, max_model_len=128)
    assert config.model_config.max_model_len == MAX_STREAM_TOKENS
    assert stream_of(config).resident_tokens == 128


def test_flags_fill_the_config() -> None:
    assert parse().additional_config == {}
    assert parse("--sink-eviction").additional_config == {"sink_paged": {}}
    both = parse("--sink-eviction", "--sink-tokens", "0", "--sink-window", "9")
    assert both.additional_config == {
        "sink_paged": {"sink_tokens": 0, "window_tokens": 9}
    }
    dotted = parse("--additional-config.sink_paged.window_tokens", "44")
    assert dotted.additional_config == {"sink_paged": {"window_tokens": 44}}
    merged = parse(
        "--sink-eviction",
        "--additional-config",
        '{"sink_paged": {"window_tokens": 44}}',
    )
    assert merged.additional_config == {"sink_paged": {"window_tokens": 44}}


@pytest.mark.parametrize(
    "flags",
    [
        ("--sink-eviction", "--sink-tokens", "-1"),
        ("--sink-eviction", "--sink-tokens", "four"),
        ("--sink-eviction", "--sink-tokens", "1.5"),
        ("--sink-eviction", "--sink-window", "0"),
        ("--sink-eviction", "--sink-token-id", "-1"),
    ],
)
def test_bad_flags_are_refused_by_the_parser(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert f"argument {flags[1]}: must be an integer in [" in capsys.readouterr().err


def test_sizes_need_the_flag() -> None:
    with pytest.raises(ValueError, match="need --sink-eviction"):
        parse("--sink-window", "100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 24}, "--block-size 24: it must be a multiple of 16"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype int8"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "--kv-transfer-config",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, "--worker-cls"),
        ({"attention_config": {"backend": "CPU_ATTN"}}, "--attention-backend CPU_ATTN"),
        (
            {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic",
              "rope_theta": 1e4, "factor": 2.0}}},
            "rope_type dynamic",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_do_not_work_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config({}, **options)


def test_a_front_end_without_hooks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        make_config({})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("there", [True, False])
def test_a_dtype_without_instructions(
    dtype: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is warned of: where oneDNN has no products of it, prompts are read slowly."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: there)
    said: list[str] = []
    monkeypatch.setattr(
        engine_module.logger,
        "warning_once",
        lambda message, *values: said.append(message % values),
    )
    make_config({}, dtype=dtype)
    warned = [text for text in said if f"no instructions for {dtype}" in text]
    assert len(warned) == (dtype != "float32" and not there)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_dtypes_of_the_cache(dtype: str) -> None:
    assert make_config({}, kv_cache_dtype=dtype).cache_config.cache_dtype == dtype


def test_cuda_brings_its_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = platforms.CUDA
    monkeypatch.setattr("sink_paged.engine.find_platform", lambda: cuda)
    monkeypatch.setitem(
        registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, cuda.backend
    )
    config = make_config({}, worker_cls=cuda.stock_worker)
    assert config.parallel_config.worker_cls == cuda.worker
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    with pytest.raises(ValueError, match="--worker-cls vllm.v1.worker.cpu_worker"):
        make_config({}, worker_cls=platforms.CPU.stock_worker)


def test_other_platforms_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("is_cpu", "is_cuda"):
        monkeypatch.setattr(platforms.current_platform, asked, lambda: False)
    assert platforms.find_platform() is None
    monkeypatch.setattr("sink_paged.engine.find_platform", lambda: None)
    monkeypatch.setattr(platforms.current_platform, "device_name", "rocm")
    with pytest.raises(ValueError, match="does not support platform rocm"):
        engine_module.enable_sink_eviction(VllmConfig(), SinkConfig())


@pytest.mark.parametrize(
    ("triton", "options", "message"),
    [
        (False, {}, "V2 without a Triton that runs here; VLLM_USE_V2_MODEL_RUNNER=0"),
        (True, {"logits_processors": ["some.Processor"]}, "custom logits processors"),
        (True, {}, None),
    ],
)
def test_model_runner_v2(
    triton: bool,
    options: dict[str, Any],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(None, **options)
    monkeypatch.setattr(engine_module, "HAS_TRITON", triton)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert config.use_v2_model_runner
    if message is None:
        engine_module.enable_sink_eviction(config, SinkConfig())
        assert stream_of(config).window == SinkWindow(4, 251)
        return
    with pytest.raises(ValueError, match=message):
        engine_module.enable_sink_eviction(config, SinkConfig())


@pytest.mark.parametrize("version", ["0.28.1", "0.99.0", "1.0.0"])
def test_other_vllm_versions_are_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(
        ValueError, match=rf"does not support vLLM {version}.*0\.29\.0.*0\.32\.0"
    ):
        make_config({})
    assert make_config(None).model_config.max_model_len == TRAINED


def test_config_without_the_setting_is_stock() -> None:
    config = make_config(None)
    assert config.model_config.max_model_len == TRAINED
    assert config.attention_config.backend is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.additional_config == {}


def test_default_max_tokens() -> None:
    stream = StreamConfig(SinkWindow(4, 251), resident_tokens=256)
    assert stream.default_max_tokens(10) == 246
    assert stream.default_max_tokens(255) == 1
    assert stream.default_max_tokens(256) == stream.default_max_tokens(9999) == 255


def test_typed_config() -> None:
    config = SinkConfig(sink_tokens=1, window_tokens=7)
    assert SinkConfig.from_mapping({"sink_tokens": 1, "window_tokens": 7}) == config
    made = make_config(config)
    assert stream_of(made).window == SinkWindow(1, 7)
    json.dumps(made.additional_config)
    assert config.resolve(9) == SinkWindow(1, 7)
    with pytest.raises(ValueError, match="above 8"):
        config.resolve(8)


@pytest.mark.parametrize(
    ("make", "layer", "reason"),
    [
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    vocab_size=320, hidden_size=64, num_hidden_layers=1, ffn_dim=64,
                    num_attention_heads=2, max_position_embeddings=128,
                    word_embed_proj_dim=64,
                )
            ),
            r"layer model\.decoder\.layers\.0\.self_attn\.attn",
            "learned absolute",
        ),
        (
            lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2)
            ),
            r"layer transformer\.h\.0\.attn\.attn",
            "learned absolute",
        ),
    ],
    ids=["opt", "gpt2"],
)  # fmt: skip
def test_unsupported_layers_are_refused_by_name(
    tmp_path: Path, make: Any, layer: str, reason: str
) -> None:
    make().float().save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=f"does not support {layer}.*{reason}"),
        engine(tmp_path, (4, 60), max_model_len=128),
    ):
        pass


def test_too_little_memory_is_refused_in_terms_of_a_stream() -> None:
    options = {"kv_cache_memory_bytes": 1 << 20, "max_num_batched_tokens": 2048}
    with (
        pytest.raises(
            ValueError, match=r"has 1 MiB, but a stream with cache config 4\+60"
        ),
        engine(GOLDEN, (4, 60), **options),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "max_model_len", "sliding", "window"),
    [
        ({}, 256, None, 251),
        ({}, 256, 64, 63),
        ({}, 40, 64, 35),
        ({"sink_tokens": 0}, 64, 64, 63),
        ({"window_tokens": 63}, 256, 64, 63),
        ({"window_tokens": 7}, 256, 64, 7),
    ],
)
def test_window_of_a_model_whose_every_layer_slides(
    settings: dict[str, int], max_model_len: int, sliding: int | None, window: int
) -> None:
    """The smaller of what is resident and what the layers were trained to see."""
    config = SinkConfig(**settings)
    assert config.resolve(max_model_len, sliding).window_tokens == window


def test_a_window_beyond_the_native_one_is_refused(tmp_path: Path) -> None:
    mistral = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        sliding_window=64,
        architectures=["MistralForCausalLM"],
    )
    mistral.save_pretrained(tmp_path)
    model = {"model": str(tmp_path)}
    assert stream_of(make_config({}, **model)).window == SinkWindow(4, 63)
    with pytest.raises(
        ValueError, match=r"sliding window of 64 tokens.*in \[1, 63\], got 64"
    ):
        make_config({"window_tokens": 64}, **model)
