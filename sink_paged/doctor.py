# SPDX-License-Identifier: Apache-2.0
"""``sink-paged doctor``: what would be served here, and why not, without any weights.

It builds the engine config that ``vllm serve --sink-eviction`` would build of the same
arguments, which is where settings and models are refused, and works out a stream's
bound and how many fit. What only shows when the model is loaded (the rotary geometry of
its layers) it cannot say.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from sink_paged.window import BlockWindow, layer_window

MIB = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """The command line.

    Returns:
        0; 1 if serving would be refused, or nothing could be found out.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        print(f"{'refused':16} vLLM cannot be imported: {error}")
        return 1
    from sink_paged import plugin

    plugin.register()
    parser = FlexibleArgumentParser(
        prog="sink-paged",
        description="doctor: versions, platform and hooks; with --model and any "
        "arguments of `vllm serve` also what a stream takes and how many fit.",
        add_json_tip=False,
    )
    parser.add_argument("command", choices=["doctor"])
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, sink_eviction=True)
    args = parser.parse_args(argv)
    problems: list[str] = []
    try:
        for name, value in installation(problems):
            print(f"{name:16} {value}", flush=True)
        if args.model is not None and not problems:
            for name, value in serving(args, problems):
                print(f"{name:16} {value}", flush=True)
    except (OSError, RuntimeError, ValueError) as error:
        problems.append(str(error))
    for problem in problems:
        print(f"{'refused':16} {problem}")
    if not problems and args.model is None:
        print(f"{'ok':16} name a --model to see what its streams take")
    return int(bool(problems))


def installation(problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Versions, platform and hooks, as lines; what is wrong goes into ``problems``."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    from sink_paged import engine, patches
    from sink_paged.patching import find
    from sink_paged.platforms import find_platform

    yield "sink_paged", version("sink-paged")
    yield "vLLM", vllm.__version__
    try:
        engine.check_vllm_version()
    except ValueError as error:
        problems.append(str(error))
    others = (f"torch {torch.__version__}", f"transformers {version('transformers')}")
    yield "with", ", ".join((*others, f"Python {platform.python_version()}"))
    ours = find_platform()
    name = current_platform.device_name
    if current_platform.is_cuda():
        name = f"{name}, {current_platform.get_device_name()}"
    yield "platform", name
    if ours is None:
        problems.append(f"no attention kernel for platform {name}")
    else:
        yield "attention", ours.backend
    plugins = entry_points(group="vllm.general_plugins")
    if "sink_paged" not in plugins.names:
        problems.append(
            "vLLM does not find the plugin: sink_paged is not installed in the "
            "environment of this Python"
        )
    if find(patches.ENGINE_HOOKS) is not None:
        yield "hooks", "vLLM carries them"
    for patch in patches.ALL:
        if patch.installed():
            yield "wrapped", f"{patch.target}: {patch.why}"


def serving(args: argparse.Namespace, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Model, cache config, bound and capacity, as lines.

    Raises:
        ValueError: naming what would be refused.
    """
    from vllm.engine.arg_utils import EngineArgs

    from sink_paged.config import StreamConfig

    config = EngineArgs.from_cli_args(args).create_engine_config()
    stream = StreamConfig.load(config.additional_config)
    assert stream is not None, "--sink-eviction is the default here"
    model, cache, parallel = (
        config.model_config,
        config.cache_config,
        config.parallel_config,
    )
    text = model.hf_text_config
    heads = model.get_num_attention_heads(parallel)
    kv_heads, head_size = model.get_num_kv_heads(parallel), model.get_head_size()
    layers = model.get_num_layers(parallel)
    yield "model", f"{model.architecture}, {model.dtype}".replace("torch.", "")
    yield (
        "",
        f"{layers} layers, {heads} query heads on {kv_heads} KV heads of {head_size}",
    )
    trained = model.get_and_verify_max_len(None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    yield "", f"trained on {trained} tokens, rotary: {rope}"
    yield "model runner", "V2" if config.use_v2_model_runner else "V1"
    yield (
        "cache config",
        f"{stream.window} ({stream.window.capacity + 1} tokens at most)",
    )

    kinds = getattr(text, "layer_types", None) or []
    local = sum(kind == "sliding_attention" for kind in kinds)
    own = getattr(text, "sliding_window", None) if local else None
    element = _bytes_per_element(config)
    page = cache.block_size * 2 * kv_heads * head_size * element
    held = decoding = nbytes = 0
    in_flight = config.max_in_flight_tokens
    for count, window in ((layers - local, None), (local, own)):
        if not count:
            continue
        kept = layer_window(stream.window, window, cache.sliding_window)
        blocks = BlockWindow(kept, cache.block_size)
        held += blocks.max_blocks(in_flight)
        decoding += blocks.max_blocks(1)
        nbytes += count * page * blocks.max_blocks(1)
        if window is not None:
            yield "", f"{count} layers have a sliding window of {window}: {kept}"
    yield "a stream", f"holds at most {held} blocks of {cache.block_size} tokens"
    size = f"{nbytes / MIB:.1f} MiB on each worker"
    yield "", f"{decoding} while it only decodes, {size}"
    memory, source = _kv_memory(config)
    if memory is None:
        yield "capacity", "unknown without a device: give --kv-cache-memory-bytes"
        return
    fit = memory // nbytes
    yield "KV cache", f"{memory / MIB:.0f} MiB ({source})"
    yield "capacity", f"{fit} streams that decode at once"
    if held * nbytes // decoding > memory:
        problems.append(
            f"the KV cache does not hold a stream with {in_flight} tokens in flight: "
            "give it more memory, or lower --sink-window or --max-num-batched-tokens"
        )


def _bytes_per_element(config: Any) -> int:
    """Of the KV cache."""
    if config.cache_config.cache_dtype.startswith("fp8"):
        return 1
    named = {"float32": 4, "float16": 2, "bfloat16": 2}
    size: int = config.model_config.dtype.itemsize
    return named.get(config.cache_config.cache_dtype, size)


def _kv_memory(config: Any) -> tuple[int | None, str]:
    """Bytes that the KV cache would get on each worker, and where that comes from."""
    import psutil
    import torch
    from vllm.platforms import current_platform

    cache, model = config.cache_config, config.model_config
    if cache.kv_cache_memory_bytes is not None:
        return int(cache.kv_cache_memory_bytes), "as given"
    if current_platform.is_cpu():
        total = psutil.virtual_memory().total
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        return None, ""
    weights = sum(
        file.stat().st_size for file in Path(model.model).glob("*.safetensors")
    )
    share = cache.gpu_memory_utilization
    left = int(share * total) - weights // config.parallel_config.tensor_parallel_size
    return max(left, 0), f"an estimate: {share:g} of the memory, less the weights"


if __name__ == "__main__":
    sys.exit(main())
