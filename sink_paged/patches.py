# SPDX-License-Identifier: Apache-2.0
"""The functions of vLLM that are wrapped, because it has no hook for them.

``patches/README.md`` is their index; the diffs there would give vLLM the hooks, and
where vLLM has them nothing is wrapped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from sink_paged.hooks import HOOKS
from sink_paged.patching import Patch

ENGINE_HOOKS = "vllm.plugins:register_engine_hooks"
"""The function that the diffs add to vLLM; called with ``HOOKS``."""


def _add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    parser = original(parser)
    HOOKS.add_cli_args(parser)
    return parser


def _from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    engine_args = original(cls, args)
    HOOKS.from_cli_args(engine_args, args)
    return engine_args


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    HOOKS.update_args(self)
    vllm_config = original(self, *args, **kwargs)
    HOOKS.update_config(vllm_config)
    return vllm_config


def _process_inputs(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    request = original(self, *args, **kwargs)
    HOOKS.update_request(self.vllm_config, request)
    return request


def _beam_search(
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    request_id: str,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    HOOKS.update_beam_search(self.engine_client.vllm_config, prompt, params)
    return original(self, prompt, request_id, params, *args, **kwargs)


def _engine_init(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, *args, **kwargs)
    HOOKS.update_front_end(self)


def _make_stats(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    stats = original(self, *args, **kwargs)
    if stats is not None:
        HOOKS.update_stats(self, stats)
    return stats


def _get_attn_backend_cls(
    original: Callable[..., Any],
    cls: type,
    selected_backend: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sink_paged.platforms import CPU

    custom = AttentionBackendEnum.CUSTOM
    if selected_backend is custom and custom.get_path() == CPU.backend:
        return CPU.backend
    return original(cls, selected_backend, *args, **kwargs)


def _register_triton_kernel_overrides(original: Callable[..., Any], cls: type) -> None:
    # vLLM scans the attributes of all modules and fails on objects of llvmlite, which
    # the CPU kernel loads; none of them is a Triton kernel.
    hidden = {name: sys.modules.pop(name) for name in llvmlite_modules()}
    try:
        original(cls)
    finally:
        sys.modules.update(hidden)


def _record_read(original: Callable[..., Any], self: Any) -> None:
    original(self)
    # ZeroMQ queues a wake-up for each notification until the socket is looked at, which
    # a reader that is never idle does not.
    self.reads_unpolled = getattr(self, "reads_unpolled", 0) + 1
    if self.reads_unpolled >= READS_UNPOLLED and self.poller is not None:
        self.reads_unpolled = 0
        self.poller.poll(0)


READS_UNPOLLED = 1024


def _sched_yield(original: Callable[..., Any]) -> None:
    from vllm.platforms import current_platform

    # Linux 6.18 lets two processes that yield all the time starve the others of the
    # machine: 20 ms of work took seconds. This sleeps for the timer's slack, 50 us.
    if current_platform.is_cpu():
        time.sleep(0)
    else:
        original()


def llvmlite_modules() -> list[str]:
    """Names of the loaded modules of llvmlite."""
    return [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]


ARGUMENTS = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        parameters=("self", "usage_context"),
        wrapper=_create_engine_config,
        why="a plugin cannot see or change the engine config",
        upstream=ENGINE_HOOKS,
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        parameters=("parser",),
        wrapper=_add_cli_args,
        why="a plugin cannot add command-line flags",
        upstream=ENGINE_HOOKS,
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        parameters=("cls", "args"),
        wrapper=_from_cli_args,
        why="a plugin cannot read its command-line flags",
        upstream=ENGINE_HOOKS,
    ),
)
"""What it takes to see that sink eviction is asked for."""

ALL = (
    *ARGUMENTS,
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        parameters=("self", "request_id", "prompt", "params"),
        wrapper=_process_inputs,
        why="a plugin cannot see requests: the default of max_tokens is the longest "
        "text, here without an end, and a sink token goes before the prompt",
        upstream=ENGINE_HOOKS,
    ),
    Patch(
        target="vllm.v1.engine.llm_engine:LLMEngine.__init__",
        parameters=("self", "vllm_config"),
        wrapper=_engine_init,
        why="the front end's work for a token grows with the output; it has no metrics "
        "of plugins",
        upstream=ENGINE_HOOKS,
    ),
    Patch(
        target="vllm.v1.engine.async_llm:AsyncLLM.__init__",
        parameters=("self", "vllm_config"),
        wrapper=_engine_init,
        why="the front end's work for a token grows with the output; it has no metrics "
        "of plugins",
        upstream=ENGINE_HOOKS,
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler.make_stats",
        parameters=("self", "spec_decoding_stats", "kv_connector_stats"),
        wrapper=_make_stats,
        why="a plugin cannot add to the statistics of a step",
        upstream=ENGINE_HOOKS,
    ),
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        parameters=("cls", "selected_backend"),
        wrapper=_get_attn_backend_cls,
        why="the CPU platform takes no attention backend but its own",
        upstream="vllm.platforms.cpu:CpuPlatform.supports_custom_attention",
    ),
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides",
        parameters=("cls",),
        wrapper=_register_triton_kernel_overrides,
        why="an engine fails to start in a process that has loaded llvmlite",
        upstream="vllm.triton_utils.dispatcher:instance_dict",
        since="0.31",
    ),
    Patch(
        target="vllm.distributed.device_communicators.shm_broadcast"
        ":SpinCondition.record_read",
        parameters=("self",),
        wrapper=_record_read,
        why="a worker in a process of its own grows by 50 bytes a step, and so does "
        "the engine core",
        upstream="vllm.distributed.device_communicators.shm_broadcast:READS_UNPOLLED",
        before="0.33",  # it looks at the socket every two seconds
    ),
    Patch(
        target="vllm.distributed.device_communicators.shm_broadcast:sched_yield",
        parameters=(),
        wrapper=_sched_yield,
        why="on a CPU, an engine core and its worker that wait for each other take the "
        "cores from the API server, whose clients then wait for minutes",
        upstream="vllm.distributed.device_communicators.shm_broadcast:WAITS_ASLEEP",
    ),
)

SERVER = (
    Patch(
        target="vllm.entrypoints.generate.beam_search.online"
        ":BeamSearchOnlineMixin.beam_search",
        parameters=("self", "prompt", "request_id", "params"),
        wrapper=_beam_search,
        why="a plugin cannot see beam searches: the default of max_tokens is the "
        "longest text, here without an end",
        upstream=ENGINE_HOOKS,
    ),
)
"""What a streaming engine's server needs besides; its modules are slow to import."""
