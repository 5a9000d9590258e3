# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for GPUs, on a machine without one.

``python -m tests.triton_targets`` prints one JSON line per compiled kernel, with its
registers, bytes of stack (spilled registers) and bytes of shared memory a program: for
Hopper, and for Ada, whose programs have the least shared memory. It must be a process
of its own: in the tests' process kernels are interpreted.
"""

import json
import os
import re
import subprocess
import tempfile
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget

from sink_paged.attention import flash
from sink_paged.attention import triton as kernel
from sink_paged.window import SinkWindow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Query dtype, cache dtype, query heads, KV heads, head size, rotary dim, block size,
# tokens of each of two requests, sinks, further arguments.
CASES: dict[str, tuple[Any, ...]] = {
    "decode": (BF16, BF16, 32, 8, 128, 128, 16, 1, 4, {}),
    "prefill": (BF16, BF16, 32, 8, 128, 128, 16, 4096, 4, {}),
    "short prefill": (FP16, FP16, 8, 8, 64, 16, 64, 30, 4, {}),
    "fp8 decode": (BF16, E4M3, 32, 8, 128, 128, 16, 1, 4, {}),
    "fp8 prefill": (FP16, E5M2, 32, 8, 128, 128, 16, 4096, 4, {}),
    "float32 decode": (FP32, FP32, 32, 8, 128, 128, 16, 1, 4, {}),
    "multi-query decode": (BF16, BF16, 71, 1, 64, 64, 48, 1, 4, {}),
    "verification": (BF16, BF16, 32, 8, 128, 128, 16, 4, 4, {}),
    "many sinks": (BF16, BF16, 32, 8, 128, 128, 16, 4096, 64, {}),
    "large head": (BF16, BF16, 16, 8, 256, 256, 16, 4096, 4, {"soft_cap": 50.0}),
    "large head, many sinks": (BF16, BF16, 16, 8, 256, 64, 16, 4096, 64, {}),
    "everything": (
        *(BF16, BF16, 16, 4, 80, 20, 16, 300, 4),
        {
            "interleaved": True,
            "soft_cap": 30.0,
            "alibi_slopes": torch.ones(16),
            "sink_logits": torch.ones(16),
        },
    ),
}


FLASH = ("prefill", "many sinks", "large head", "large head, many sinks")
HOPPER, ADA = 90, 89
COMPILED: list[Any] = []
DECODE_TOKENS = 4


class Driver:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Compiler:
    """Stands in for a kernel: compiles its launches and runs none of them."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            COMPILED.append(self.function.warmup(*args, grid=grid, **kwargs))

        return launch


def resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.check_output(
            [tool, "--dump-resource-usage", file.name], text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found, listing
    return int(found[1]), int(found[2])


def compile_cases(capability: int) -> None:
    """Print a line for each kernel of each case, compiled for a compute capability."""
    triton.runtime.driver.set_active(Driver(capability))
    COMPILED.clear()
    for name, case in CASES.items():
        dtype, cache_dtype, heads, kv_heads, size, *numbers, more = case
        rotary_dim, block, tokens, sinks = numbers
        scale = torch.ones(()) if cache_dtype.itemsize == 1 else None
        tensors = (
            torch.empty(2 * tokens, heads, size, dtype=dtype),
            torch.empty(9, kv_heads, block, 2 * size, dtype=cache_dtype),
            torch.empty(2 * tokens, heads, size, dtype=dtype),
            torch.zeros(3, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(2, 200, dtype=torch.int32),
            torch.empty(2 * tokens, rotary_dim),
        )
        window = SinkWindow(sinks, 2048 - sinks)
        options = {"window": window, "scale": 1.0, "max_query_len": tokens}
        decode_tokens = tokens if tokens <= DECODE_TOKENS else 1
        kernel.sink_attention(
            *tensors,
            k_scale=scale,
            v_scale=scale,
            workspace=kernel.Workspace(
                heads,
                kv_heads,
                size,
                torch.device("cpu"),
                max_query_len=decode_tokens,
            ),
            **options,
            **more,
        )
        if capability == HOPPER and name in FLASH:
            _, _, _, *batch, _ = tensors
            unrolled = flash.window_table(
                *batch, window=window, block_size=block, max_query_len=tokens
            )
            flash.sink_attention(*tensors, unrolled=unrolled, **options, **more)
        for binary in COMPILED:
            registers, stack = resources(binary.asm["cubin"])
            record = {
                "capability": capability,
                "case": name,
                "kernel": binary.metadata.name,
                "registers": registers,
                "stack": stack,
                "shared_memory": binary.metadata.shared,
            }
            print(json.dumps(record), flush=True)
        COMPILED.clear()


def main() -> None:
    kernel.attend = Compiler(kernel.attend)
    kernel.merge = Compiler(kernel.merge)
    flash.add_sinks = Compiler(flash.add_sinks)
    flash.unroll = Compiler(flash.unroll)
    flash.attend_window = lambda query, *_, **__: torch.empty(query.shape[1::-1])
    for capability in (HOPPER, ADA):
        compile_cases(capability)


if __name__ == "__main__":
    main()
