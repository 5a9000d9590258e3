# SPDX-License-Identifier: Apache-2.0
"""The functions of vLLM that are wrapped, because it has no hook for them.

``patches/README.md`` is their index; the diffs there would give vLLM the hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sink_paged.cli import add_arguments, merge_settings, settings_from_arguments
from sink_paged.config import SinkConfig, StreamLength, sink_settings
from sink_paged.patching import Patch


def _add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    parser = original(parser)
    add_arguments(parser)
    return parser


def _from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    settings = settings_from_arguments(args)
    engine_args = original(cls, args)
    if settings is not None:
        engine_args.additional_config = merge_settings(
            engine_args.additional_config, settings
        )
    return engine_args


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    settings = sink_settings(self.additional_config)
    if settings is None:
        return original(self, *args, **kwargs)
    from sink_paged import engine

    engine.check_vllm_version()
    config = SinkConfig.from_mapping(settings)
    vllm_config = original(self, *args, **kwargs)
    engine.enable_sink_eviction(vllm_config, config)
    return vllm_config


def _process_inputs(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    request = original(self, *args, **kwargs)
    length = self.model_config.max_model_len
    sampling = request.sampling_params
    if not isinstance(length, StreamLength) or sampling is None:
        return request
    from vllm.exceptions import VLLMValidationError

    from sink_paged.engine import default_max_tokens

    prompt_tokens = len(request.prompt_token_ids)
    # vLLM writes what is left of the length when the client named no max_tokens.
    if sampling.max_tokens >= length - prompt_tokens:
        sampling.max_tokens = default_max_tokens(length, prompt_tokens)
        if sampling.min_tokens > sampling.max_tokens:
            raise VLLMValidationError(
                f"min_tokens={sampling.min_tokens} is above {sampling.max_tokens}, the "
                "most that a request gets which names no max_tokens",
                parameter="min_tokens",
                value=sampling.min_tokens,
            )
    return request


def _get_attn_backend_cls(
    original: Callable[..., Any],
    cls: type,
    selected_backend: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sink_paged.engine import BACKEND_PATH

    custom = AttentionBackendEnum.CUSTOM
    if selected_backend is custom and custom.get_path() == BACKEND_PATH:
        return BACKEND_PATH
    return original(cls, selected_backend, *args, **kwargs)


CREATE_ENGINE_CONFIG = Patch(
    target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
    parameters=("self", "usage_context"),
    wrapper=_create_engine_config,
    why="a plugin cannot see or change the engine config",
)

ALL = (
    CREATE_ENGINE_CONFIG,
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        parameters=("parser",),
        wrapper=_add_cli_args,
        why="a plugin cannot add command-line flags",
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        parameters=("cls", "args"),
        wrapper=_from_cli_args,
        why="a plugin cannot read its command-line flags",
    ),
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        parameters=("self", "request_id", "prompt", "params"),
        wrapper=_process_inputs,
        why="the default of max_tokens is the longest text, here without an end",
    ),
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        parameters=("cls", "selected_backend"),
        wrapper=_get_attn_backend_cls,
        why="the CPU platform takes no attention backend but its own",
    ),
)
