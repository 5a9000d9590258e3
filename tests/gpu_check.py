# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one go: ``python tests/gpu_check.py``.

The kernels against their oracles; the 2023 code's losses and greedy tokens on both of
vLLM's model runners, eager, compiled and in CUDA graphs; the same tokens with drafts;
layers that keep different tokens; an 8-bit cache; then the time of the attention kernel
beside vLLM's own. Each part runs in a process of its own and prints a line; ``--jobs``
runs several beside each other, but what measures time or memory after the others,
alone. ``--only`` takes some of them, as ``--list`` names them.
Without a CUDA device all are skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}},
    "decode graphs": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    },
    "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "default": {},
}
"""Engine options; the last is what users get: compiled, full and piecewise graphs."""


def check_engine(mode: str, tensor_parallel: int = 1) -> str:
    """Losses and greedy tokens of the 2023 code, and of two streams beside each other.

    Returns:
        What was seen.
    """
    from tests.engines import (
        GOLDEN,
        first_near_tie,
        generate,
        greedy,
        prompt_losses,
        worst,
    )

    golden = json.loads((GOLDEN / "golden.json").read_text())
    ids, reference = golden["ids"], golden["res"]["greedy_4+60"]
    tie = first_near_tie(reference["top2_gap"])
    options = {
        **MODES[mode],
        "max_num_batched_tokens": 128,
        "tensor_parallel_size": tensor_parallel,
    }
    with gpu_engine((4, 60), **options) as llm:
        read = generate(llm, [ids], greedy(1, prompt_logprobs=0))[0]
        error = worst(prompt_losses(read), golden["res"]["4+60"]["nll"])
        prompt = ids[: reference["prompt_len"]]
        alone = generate(llm, [prompt], greedy(400))[0].outputs[0].token_ids
        beside = generate(llm, [prompt, ids[:300], ids], [greedy(400)] * 3)
    assert error < 2e-3, f"losses differ by {error}"
    for tokens in (alone, beside[0].outputs[0].token_ids):
        assert list(tokens[:tie]) == reference["tokens"][:tie]
        assert len(tokens) == 400
    return f"losses within {error:.1e}, greedy tokens equal up to the tie at {tie}"


def gpu_engine(sinks: tuple[int, int] | None, **options: Any) -> Any:
    """``tests.engines.engine`` on the golden model, without its defaults for a CPU."""
    from tests.engines import GOLDEN, engine

    # Enough for a pocket model; several checks may share the device.
    defaults = {"enforce_eager": False, "gpu_memory_utilization": 0.05}
    return engine(GOLDEN, sinks, **{**defaults, **options})


def check_speculation(method: str) -> str:
    """Greedy tokens of the 2023 code with drafts, on the runner that vLLM chooses.

    Args:
        method: of the drafter; a draft model is the golden one itself, whose drafts
            hold only if it sees the same context as its target.
    """
    from tests.engines import (
        GOLDEN,
        first_near_tie,
        generate,
        greedy,
        pool_is_empty,
    )

    golden = json.loads((GOLDEN / "golden.json").read_text())
    ids, reference = golden["ids"], golden["res"]["greedy_4+60"]
    tie = first_near_tie(reference["top2_gap"])
    drafter: dict[str, Any] = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    if method == "draft_model":
        drafter = {"model": str(GOLDEN)}
    config = {"method": method, "num_speculative_tokens": 3}
    options = {"max_num_batched_tokens": 128, "disable_log_stats": False}
    loop = [256, *([5, 9, 17, 3] * 30)]
    # Texts of few tokens repeat themselves; a draft model does not know of the few.
    few = None if method == "draft_model" else list(range(12))
    few_tokens = greedy(200, allowed_token_ids=few)
    with gpu_engine((4, 60), **options) as llm:
        alone = generate(llm, [loop], few_tokens)[0].outputs[0].token_ids
    with gpu_engine((4, 60), speculative_config=config | drafter, **options) as llm:
        prompts = [ids[: reference["prompt_len"]], ids[:300], loop]
        outputs = generate(llm, prompts, [greedy(400), greedy(400), few_tokens])
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduled_by = type(scheduler).__name__
        v2 = llm.llm_engine.vllm_config.use_v2_model_runner
        assert pool_is_empty(llm)
    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    right = counts["vllm:spec_decode_num_accepted_tokens"]
    tokens = list(outputs[0].outputs[0].token_ids)
    assert tokens[:tie] == reference["tokens"][:tie]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [400, 400, 200]
    looped = list(outputs[2].outputs[0].token_ids)
    same = next((i for i in range(200) if looped[i] != alone[i]), 200)
    assert same > 20, f"the third text differs from {same} on"
    if method == "draft_model":
        assert right > 0.9 * drafted, f"{right} of {drafted} drafts: another context"
    else:
        assert 0 < right < drafted
    runner = f"runner V{1 + v2}, {scheduled_by}"
    return (
        f"{runner}: {right} of {drafted} drafts held, tokens equal up to the tie at "
        f"{tie}, those of another text up to {same}"
    )


def check_long_stream() -> str:
    """300,000 tokens of a stream, read and written, in graphs: memory is flat."""
    import torch

    from tests.engines import generate, greedy, kv_cache_manager, pool_is_empty

    ids = [7919 * i * i % 251 for i in range(200_000)]
    with gpu_engine((4, 60), max_num_batched_tokens=2048) as llm:
        generate(llm, [ids[:5000]], greedy(500))
        before = torch.cuda.memory_reserved()
        start = time.perf_counter()
        generate(llm, [ids], greedy(100_000))
        seconds = time.perf_counter() - start
        grown = torch.cuda.memory_reserved() - before
        blocks = kv_cache_manager(llm).block_pool.num_gpu_blocks
        assert pool_is_empty(llm)
    assert grown < 64 << 20, f"{grown >> 20} MiB more on the device"
    return f"{seconds:.0f} s, {grown >> 20} MiB more, pool of {blocks} blocks empty"


def check_fp8() -> str:
    """An 8-bit cache: the losses of a float32 one that holds the numbers it stored.

    Stock vLLM is no oracle, since it rounds the queries to 8 bits too.
    """
    import torch

    from tests.engines import GOLDEN, eight_bit_losses, worst

    if torch.cuda.get_device_capability() < (8, 9):
        return "skipped: compute capability below 8.9"
    ids = json.loads((GOLDEN / "golden.json").read_text())["ids"][:300]
    losses = eight_bit_losses(ids, enforce_eager=False, gpu_memory_utilization=0.05)
    effect = worst(losses["replayed"], losses["plain"])
    error = worst(losses["replayed"], losses["fp8"])
    assert effect > 1
    assert error < 2e-3, f"losses differ by {error}"
    return f"losses within {error:.1e}, which the rounding changes by {effect:.1e}"


def check_several_groups() -> str:
    """Global and sliding layers, whose caches keep different tokens, in graphs."""
    from tests.stream_checks import check_groups

    error = check_groups(enforce_eager=False, gpu_memory_utilization=0.05)
    return f"losses within {error:.1e}"


def check_flash(mode: str) -> str:
    """Prompts through FlashAttention in an engine: the losses of the other route.

    Full graphs of mixed batches leave it out, see ``SinkTritonMetadataBuilder``. Steps
    that verify drafts do too, in graphs or not: the losses of reading what they wrote.
    """
    import pytest

    from sink_paged.attention import flash
    from tests.engines import drafted_error, flash_losses, worst

    if not flash.is_available():
        return "skipped: no FlashAttention 3 here"
    options = {**MODES[mode], "gpu_memory_utilization": 0.05, "dtype": "float16"}
    ids = [7919 * i * i % 251 for i in range(1, 600)]
    calls = []
    attend = flash.sink_attention

    def counted(query: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(len(query))
        attend(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "sink_attention", counted)
        losses = flash_losses(ids, **{"enforce_eager": False, **options})
        drafted = drafted_error(200, **{"enforce_eager": False, **options})
    error = worst(losses["Triton"], losses["FlashAttention"])
    assert bool(calls) == (mode != "full graphs"), f"{len(calls)} calls"
    assert error < 0.06, f"losses differ by {error}"
    assert drafted < 0.06, f"verified and read, they differ by {drafted}"
    return (
        f"{len(calls)} calls, losses of both routes within {error:.1e}, verified and "
        f"read within {drafted:.1e}"
    )


def run_tests(*paths: str) -> str:
    """Test modules whose kernels run on the GPU where there is one."""
    command = [sys.executable, "-m", "pytest", "-q", *paths]
    if importlib.util.find_spec("xdist"):  # each process compiles kernels of its own
        command += ["-n", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.strip().splitlines()[-1]


def run_timing() -> str:
    """The table of ``scripts/bench_attention_cuda.py``."""
    command = [sys.executable, "scripts/bench_attention_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return "\n" + done.stdout


CHECKS: dict[str, tuple[Callable[[], str], dict[str, str]]] = {
    "attention kernel": (
        lambda: run_tests("tests/test_triton_attention.py"),
        {"TRITON_INTERPRET": "0"},
    ),
    "rotation kernel": (
        lambda: run_tests("tests/test_rotation_kernel.py"),
        {"TRITON_INTERPRET": "0"},
    ),
}
for _version in ("1", "0"):
    for _mode in MODES:
        CHECKS[f"runner V{1 + int(_version)}, {_mode}"] = (
            lambda mode=_mode: check_engine(mode),  # type: ignore[misc]
            {"VLLM_USE_V2_MODEL_RUNNER": _version},
        )
    CHECKS[f"FlashAttention, V{1 + int(_version)}"] = (
        lambda: check_flash("default"),
        {"VLLM_USE_V2_MODEL_RUNNER": _version},
    )
CHECKS["FlashAttention, full graphs"] = (lambda: check_flash("full graphs"), {})
for _method in ("draft_model", "ngram", "ngram_gpu"):
    CHECKS[f"speculation, {_method}"] = (
        lambda method=_method: check_speculation(method),  # type: ignore[misc]
        {},
    )
CHECKS["speculation, draft_model, V1"] = (
    lambda: check_speculation("draft_model"),
    {"VLLM_USE_V2_MODEL_RUNNER": "0"},
)
CHECKS["several groups"] = (check_several_groups, {})
CHECKS["8-bit cache"] = (check_fp8, {})
CHECKS["two GPUs"] = (
    lambda: check_engine("default", tensor_parallel=2),
    {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
)
CHECKS["long stream"] = (check_long_stream, {})
CHECKS["time"] = (run_timing, {})
ALONE = ("two GPUs", "long stream", "time")
"""Checks that nothing may run beside; the last ones."""


def run_check(name: str, seconds: float) -> bool:
    """Run a check in a process of its own, `seconds` at most; print what it said.

    Returns:
        Whether it passed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_CACHE_ROOT": cache,
            "TRITON_INTERPRET": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), os.environ.get("PYTHONPATH", "")]
            ),
        }
        if importlib.util.find_spec("flashinfer") is None:
            environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        command = [sys.executable, __file__, "--here", name]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment, **CHECKS[name][1]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as check:
            try:
                said, problem = check.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(check.pid, signal.SIGKILL)  # its children too
                said, problem = check.communicate()
        passed = check.returncode == 0
    if not passed:
        said = "FAILED\n" + said[-1000:] + problem[-3000:]
    print(f"{name} ({time.perf_counter() - start:.0f} s): {said.strip()}", flush=True)
    return passed


def main() -> int:
    """Run the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the checks and stop")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--timeout", type=float, default=900, help="s, of a check")
    parser.add_argument("--here", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(CHECKS[args.here][0]())
        return 0
    if args.list:
        print("\n".join(CHECKS))
        return 0

    import torch

    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    names = list(args.only or CHECKS)
    if "two GPUs" in names and torch.cuda.device_count() < 2:
        names.remove("two GPUs")
        print("two GPUs: skipped: one GPU", flush=True)
    names.sort(key=lambda name: name in ALONE)  # keeps the order otherwise
    shared = [name for name in names if name not in ALONE]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda name: run_check(name, args.timeout), shared)
        passed = dict(zip(shared, results, strict=True))
    for name in names[len(shared) :]:
        passed[name] = run_check(name, args.timeout)
    failed = [name for name in names if not passed[name]]
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
