# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one go: ``python tests/gpu_check.py``.

The kernels against their oracles; the 2023 code's losses and greedy tokens on both of
vLLM's model runners, eager, compiled and in CUDA graphs; an 8-bit cache against stock
vLLM; then the time of the attention kernel beside vLLM's own. Each part runs in a
process of its own and prints a line. ``--only`` takes some of them, as ``--list`` names
them. Without a CUDA device all are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
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

    return engine(GOLDEN, sinks, **{"enforce_eager": False, **options})


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
    """An 8-bit cache: within the window the losses are stock vLLM's with one."""
    import torch

    from tests.engines import generate, greedy, prompt_losses, worst

    if torch.cuda.get_device_capability() < (8, 9):
        return "skipped: compute capability below 8.9"
    ids = [256, *(7919 * i * i % 251 for i in range(1, 200))]
    losses = []
    for sinks, options in (
        ((4, 251), {}),
        (None, {"attention_config": {"backend": "TRITON_ATTN"}}),
    ):
        with gpu_engine(sinks, kv_cache_dtype="fp8", **options) as llm:
            output = generate(llm, [ids], greedy(1, prompt_logprobs=0))[0]
            losses.append(prompt_losses(output))
    error = worst(*losses)
    assert error < 0.05, f"losses differ by {error}"
    return f"losses within {error:.1e} of stock"


def run_tests(*paths: str) -> str:
    """Test modules whose kernels run on the GPU where there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *paths]
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
CHECKS["long stream"] = (check_long_stream, {})
CHECKS["8-bit cache"] = (check_fp8, {})
CHECKS["two GPUs"] = (
    lambda: check_engine("default", tensor_parallel=2),
    {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
)
CHECKS["time"] = (run_timing, {})


def main() -> int:
    """Run the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the checks and stop")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK")
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
    failed = []
    for name in args.only or CHECKS:
        if name == "two GPUs" and torch.cuda.device_count() < 2:
            print(f"{name}: skipped: one GPU", flush=True)
            continue
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TRITON_INTERPRET": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), os.environ.get("PYTHONPATH", "")]
            ),
        }
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--here", name],
            cwd=ROOT,
            env={**os.environ, **environment, **CHECKS[name][1]},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            failed.append(name)
        said = (
            done.stdout.strip()
            if done.returncode == 0
            else "FAILED\n" + (done.stdout[-1000:] + done.stderr[-3000:])
        )
        print(f"{name} ({time.perf_counter() - start:.0f} s): {said}", flush=True)
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
