# SPDX-License-Identifier: Apache-2.0
"""``sink-paged doctor``: what would be served here, and why not, without any weights.

It builds the engine config that ``vllm serve --sink-eviction`` would build of the same
engine arguments, which is where settings and models are refused, and lets vLLM group
the layers' KV caches: a stream's bound, and how many fit. What only shows when the
model is loaded (the rotary geometry of its layers) it cannot say.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from sink_paged.window import SinkWindow, layer_window

MIB = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """The command line.

    Returns:
        0; 1 if serving would be refused, or nothing could be found out.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    problems: list[str] = []

    def say(lines: Iterable[tuple[str, Any]]) -> None:
        for name, value in lines:
            print(f"{name:16} {value}", flush=True)

    try:
        from sink_paged import plugin

        plugin.register()
        args = parse(argv)
        say(installation(problems))
        if args.model is not None and not problems:
            say(serving(args))
    except Exception as error:  # whatever vLLM raises for a model is the answer
        problems.append(str(error) or type(error).__name__)
    for problem in problems:
        print(f"{'refused':16} {problem}")
    if not problems and args.model is None:
        print(f"{'ok':16} name a model to see what its streams take")
    return int(bool(problems))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of ``vllm serve``, with sink eviction on."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from sink_paged.patching import find_first

    make_arg_parser = find_first(
        "vllm.entrypoints.common.cli_args:make_arg_parser",  # since 0.33
        "vllm.entrypoints.launchers.cli_args:make_arg_parser",
    )

    parser = FlexibleArgumentParser(
        prog="sink-paged doctor",
        usage="sink-paged doctor [MODEL] [any arguments of vllm serve]",
        description="Versions, platform and hooks; with a model also what its streams "
        "take and how many fit.",
        add_json_tip=False,
    )
    parser.add_argument("command", help=argparse.SUPPRESS)
    make_arg_parser(parser)
    parser.set_defaults(model=None, sink_eviction=True)
    argv = sys.argv[1:] if argv is None else argv
    command, *others = argv or ["--help"]
    if command in ("-h", "--help"):
        parser.print_help()
        parser.exit()
    if command != "doctor":
        parser.error(f"there is no command {command}")
    args: argparse.Namespace = parser.parse_args(["serve", *others])  # as vLLM knows it
    args.model = args.model_tag or args.model
    return args


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


def serving(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Model, cache config, bound and capacity, as lines.

    Raises:
        ValueError: naming what would be refused.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from sink_paged.config import StreamConfig
    from sink_paged.kv_cache import StreamBound, block_bytes, group_layers, group_spec
    from sink_paged.platforms import find_platform, lacks_instructions

    # The server's defaults depend on the context.
    config = EngineArgs.from_cli_args(args).create_engine_config(
        UsageContext.OPENAI_API_SERVER
    )
    stream = StreamConfig.load(config.additional_config)
    assert stream is not None, "--sink-eviction is the default here"
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_text_config
    yield "model", f"{model.architecture}, {model.dtype}".replace("torch.", "")
    heads, kv_heads = (
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
    )
    on = f"{heads} query heads on {kv_heads} KV heads of {model.get_head_size()}"
    if lacks_instructions(model.dtype):
        yield "", "(which this CPU has no instructions for: --dtype float32 is faster)"
    yield "", f"{model.get_num_layers(parallel)} layers, a worker has {on}"
    trained = model.get_and_verify_max_len(None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    yield "", f"trained on {trained} tokens, rotary: {rope}"
    yield "model runner", "V2" if config.use_v2_model_runner else "V1"
    resident = stream.window.capacity + 1
    yield "cache config", f"{stream.window} ({resident} tokens, the query's included)"

    platform = find_platform()
    assert platform is not None, "an engine config was made"
    layouts = resolve_obj_by_qualname(platform.backend).supported_kv_cache_layouts()
    config.cache_config.kv_cache_layout = layouts[0].name  # the engine core's choice
    specs = _specs(config, stream.window)
    groups = group_layers(specs, config)
    for group in groups if len(groups) > 1 else ():
        window = group_spec(group).blocks.window
        yield "", f"{window} in a group of {len(group.layer_names)} layers"
    bound = StreamBound.of(groups, config)
    size = group_spec(groups[0]).block_size
    yield "a stream", f"holds at most {bound.blocks} blocks of {size} tokens,"
    yield "", f"{bound.decoding_blocks} while it only decodes"
    memory, source = _kv_memory(config)
    if memory is None:
        yield "capacity", source
        return
    yield "KV cache", f"{memory / MIB:.0f} MiB on each worker ({source})"
    bound.check_fits(memory, config)
    pool = memory // block_bytes(groups) - 1  # one is vLLM's null block
    fit, rows = pool // bound.decoding_blocks, config.scheduler_config.max_num_seqs
    which = "the pool" if fit < rows else "--max-num-seqs"
    yield "capacity", f"{min(fit, rows)} streams that decode at once, by {which}"
    yield "", f"(a pool of {pool} blocks)"


def _specs(config: Any, stream: SinkWindow) -> dict[str, Any]:
    """The caches of the layers, a draft model's too, as far as configs tell them."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from sink_paged.kv_cache import SinkWindowSpec

    cache, speculative = config.cache_config, config.speculative_config
    models = {"layers": (config.model_config, config.parallel_config)}
    if speculative is not None and speculative.uses_draft_model():
        models["draft_model"] = (
            speculative.draft_model_config,
            speculative.draft_parallel_config,
        )
    specs = {}
    for prefix, (model, parallel) in models.items():
        text = model.hf_text_config
        layers = model.get_num_layers(parallel)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
        layout = FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
            dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
        )
        for layer, kind in enumerate(kinds):
            own = text.sliding_window if kind == "sliding_attention" else None
            specs[f"{prefix}.{layer}"] = SinkWindowSpec.from_attention(
                layout,
                layer_window(stream, own, cache.sliding_window),
                config.num_lookahead_tokens,
            )
    return specs


def _kv_memory(config: Any) -> tuple[int | None, str]:
    """Bytes that the KV cache would get on each worker, and where that comes from."""
    import psutil
    import torch
    from vllm.platforms import current_platform

    cache, model = config.cache_config, config.model_config
    if cache.kv_cache_memory_bytes is not None:
        return int(cache.kv_cache_memory_bytes), "as given"
    files = Path(model.model).glob("*.safetensors")
    weights = sum(file.stat().st_size for file in files)
    if not weights:
        return None, "unknown, as the weights' size is: give --kv-cache-memory-bytes"
    if current_platform.is_cpu():
        total = psutil.virtual_memory().total
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        return None, "unknown without a device: give --kv-cache-memory-bytes"
    share = cache.gpu_memory_utilization
    left = int(share * total) - weights // config.parallel_config.tensor_parallel_size
    return max(left, 0), f"an estimate: {share:g} of the memory, less the weights"


if __name__ == "__main__":
    sys.exit(main())
