# SPDX-License-Identifier: Apache-2.0
"""Time sink attention beside vLLM's own kernels, on a GPU.

Stock kernels attend sequences of exactly the resident length; ours streams far past
their window with the same number of resident keys. A prefill attends a window in all of
them; ours takes the route that the backend takes, without the unrolling of the block
tables, which all layers of a step share. The kernels take turns in one process, each
launch from a replayed CUDA graph, the second-level cache full of other data; the time
is the median. That of an empty kernel is part of each, and printed first.

The floor of a decode is one read of the resident keys and values, of a prefill
`4 * tokens * resident * heads * head_size` operations; bandwidth and rate are those of
a large copy and a large matrix product, measured here.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernels.shapes import SHAPES
from provenance import provenance
from torch import Tensor

from sink_paged.attention import flash
from sink_paged.attention import triton as ours
from sink_paged.window import BlockWindow, SinkWindow

SINK_TOKENS = 4
BLOCK_SIZE = 16
OTHER_BYTES = 256 << 20
"""Read before each launch: the second-level cache holds them and, as in a model between
two attention layers, nothing that must be written back first."""


@dataclass(frozen=True)
class Case:
    """One measured point; `resident` counts the keys of a request's last query."""

    shape: str
    batch: int
    tokens: int
    resident: int
    dtype: str


@dataclass
class Inputs:
    """A batch in a paged cache: `columns` blocks of each request, in any order."""

    query: Tensor
    cache: Tensor
    table: Tensor
    starts: Tensor
    seq_lens: Tensor

    @classmethod
    def make(cls, case: Case, columns: int, seq_len: int) -> "Inputs":
        """Random contents on the GPU."""
        heads, kv_heads, head_size = SHAPES[case.shape]
        dtype = getattr(torch, case.dtype)
        num_blocks = 1 + case.batch * columns
        shape = (num_blocks, kv_heads, BLOCK_SIZE, 2 * head_size)
        starts = torch.arange(case.batch + 1, device="cuda", dtype=torch.int32)
        starts *= case.tokens
        order = torch.randperm(num_blocks - 1, device="cuda", dtype=torch.int32)
        return cls(
            query=torch.randn(
                case.batch * case.tokens, heads, head_size, device="cuda", dtype=dtype
            ),
            cache=torch.randn(shape, device="cuda", dtype=dtype),
            table=(order + 1).view(case.batch, columns),
            starts=starts,
            seq_lens=torch.full(
                (case.batch,), seq_len, device="cuda", dtype=torch.int32
            ),
        )


def make_ours(case: Case) -> Callable[[], Any]:
    """A call of this package's kernel on streams far past their window."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    window = SinkWindow(SINK_TOKENS, case.resident - SINK_TOKENS - 1)
    columns = BlockWindow(window, BLOCK_SIZE).max_blocks(case.tokens)
    inputs = Inputs.make(case, columns, 10 * case.resident + 37)
    output = torch.empty_like(inputs.query)
    angles = torch.randn(len(inputs.query), head_size // 2, device="cuda")
    tensors = (
        inputs.query,
        inputs.cache,
        output,
        inputs.starts,
        inputs.seq_lens,
        inputs.table,
        torch.cat([angles.cos(), angles.sin()], dim=1),
    )
    options = {"window": window, "scale": head_size**-0.5, "max_query_len": case.tokens}
    dtype = inputs.query.dtype
    if (
        case.tokens > 1
        and flash.is_available()
        and flash.suits(head_size, dtype, dtype)
    ):
        unrolled = flash.window_table(
            inputs.starts,
            inputs.seq_lens,
            inputs.table,
            window=window,
            block_size=BLOCK_SIZE,
            max_query_len=case.tokens,
        )
        return lambda: flash.sink_attention(*tensors, unrolled=unrolled, **options)
    workspace = ours.Workspace(heads, kv_heads, head_size, inputs.query.device)
    return lambda: ours.sink_attention(*tensors, workspace=workspace, **options)


def stock_inputs(case: Case) -> tuple[Inputs, Tensor, Tensor, int]:
    """Sequences of the resident length, and their keys and values as stock has them."""
    seq_len = case.resident + case.tokens - 1
    inputs = Inputs.make(case, -(-seq_len // BLOCK_SIZE), seq_len)
    keys, values = inputs.cache.transpose(1, 2).chunk(2, dim=-1)
    return inputs, keys, values, seq_len


def make_triton(case: Case) -> Callable[[], Any]:
    """A call of the kernel of `TRITON_ATTN`, with the memory its backend gives it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    heads, kv_heads, head_size = SHAPES[case.shape]
    inputs, keys, values, seq_len = stock_inputs(case)
    output = torch.empty_like(inputs.query)
    split_up_to, segments = 128 // kv_heads, 16
    partial = (max(split_up_to, 1), heads, segments)
    memory = {
        "seq_threshold_3D": split_up_to,
        "num_par_softmax_segments": segments,
        "softmax_segm_output": torch.empty(*partial, head_size, device="cuda"),
        "softmax_segm_max": torch.empty(partial, device="cuda"),
        "softmax_segm_expsum": torch.empty(partial, device="cuda"),
    }
    window = (-1, -1) if case.tokens == 1 else (case.resident - 1, 0)
    return lambda: unified_attention(
        q=inputs.query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=inputs.starts,
        max_seqlen_q=case.tokens,
        seqused_k=inputs.seq_lens,
        max_seqlen_k=seq_len,
        softmax_scale=head_size**-0.5,
        causal=True,
        window_size=window,
        block_table=inputs.table,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        **memory,
    )


def make_flash(case: Case) -> Callable[[], Any]:
    """A call of the kernel of `FLASH_ATTN`; on Hopper its third version."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    inputs, keys, values, seq_len = stock_inputs(case)
    output = torch.empty_like(inputs.query)
    window = (-1, -1) if case.tokens == 1 else (case.resident - 1, 0)
    version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2
    return lambda: flash_attn_varlen_func(
        inputs.query,
        keys,
        values,
        out=output,
        max_seqlen_q=case.tokens,
        cu_seqlens_q=inputs.starts,
        max_seqlen_k=seq_len,
        seqused_k=inputs.seq_lens,
        causal=True,
        softmax_scale=SHAPES[case.shape][2] ** -0.5,
        window_size=window,
        block_table=inputs.table,
        fa_version=version,
    )


MAKERS = {"sink_paged": make_ours, "TRITON_ATTN": make_triton, "FLASH_ATTN": make_flash}


class Replay:
    """A call in a CUDA graph of its own; keeps the tensors that the call reads."""

    def __init__(self, call: Callable[[], Any]) -> None:
        """Compile, run and capture the call."""
        self.call = call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            call()

    def __call__(self) -> None:
        self.graph.replay()


def median_us(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Microseconds of each call, the calls in turns."""
    other = torch.zeros(OTHER_BYTES // 4, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.amax()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(1000 * start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def rates(dtype: str, repeats: int) -> tuple[float, float]:
    """Bytes and operations a microsecond, of a large copy and a large product."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, dtype))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: square @ square}
    us = median_us(calls, repeats)
    return 2 * len(source) / us["copy"], 2 * 8192**3 / us["product"]


def floor_us(case: Case, bandwidth: float, rate: float) -> float:
    """The least time that the bytes and operations of a case take."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    element = getattr(torch, case.dtype).itemsize
    keys = case.resident + case.tokens - 1
    num_bytes = 2 * case.batch * keys * kv_heads * head_size * element
    operations = 4 * case.batch * case.tokens * case.resident * heads * head_size
    return max(num_bytes / bandwidth, operations / rate)


def cases(quick: bool) -> list[Case]:
    """Decodes of 1, 8 and 32 streams, and prefill chunks at a window of 2,048."""
    found = []
    for shape in list(SHAPES)[: 1 if quick else None]:
        for resident in (2048,) if quick else (512, 2048, 4096):
            for batch in (1, 8, 32):
                found.append(Case(shape, batch, 1, resident, "bfloat16"))
        for tokens in (128, 512, 2048):
            found.append(Case(shape, 1, tokens, 2048, "bfloat16"))
    return found


def main() -> None:
    """Print a table; write `attention_cuda.json` and `attention_cuda.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output-dir", type=Path, default=Path("bench_out"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    bandwidth, rate = rates("bfloat16", args.repeats)
    token = torch.zeros(1, device="cuda")
    launch = median_us({"launch": Replay(token.zero_)}, args.repeats)["launch"]
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e6:.2f} TB/s, ", end="")
    print(f"bfloat16 product {rate / 1e6:.0f} Tflop/s, launch {launch:.1f} us.")
    print("Microseconds:")
    print(f"{'case':34} {'floor':>8} " + " ".join(f"{name:>12}" for name in MAKERS))
    rows = []
    for case in cases(args.quick):
        graphs: dict[str, Callable[[], Any]] = {}
        for name, make in MAKERS.items():
            try:
                graphs[name] = Replay(make(case))
            except (
                ImportError,
                NotImplementedError,
                RuntimeError,
                ValueError,
            ) as error:
                print(f"{name} does not run: {error}")
        us = median_us(graphs, args.repeats)
        floor = floor_us(case, bandwidth, rate)
        label = f"{case.shape} batch {case.batch} x {case.tokens} @ {case.resident}"
        columns = [f"{us[name]:12.1f}" if name in us else f"{'':12}" for name in MAKERS]
        print(f"{label:34} {floor:8.1f} " + " ".join(columns), flush=True)
        rows.append({**asdict(case), "floor_us": floor, "us": us})
    result = {
        "provenance": provenance(),
        "bytes_per_us": bandwidth,
        "operations_per_us": rate,
        "launch_us": launch,
        "cases": rows,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "attention_cuda.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}, {plot(result, path.with_suffix('.png'))}")


def plot(result: dict[str, Any], path: Path) -> Path:
    """Times of ours and the floors, over those of the other kernels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["cases"]
    figure, axes = pyplot.subplots(
        figsize=(8, 1.5 + 0.2 * len(rows)), layout="constrained"
    )
    labels = [
        f"{row['shape']}, {row['batch']} x {row['tokens']} @ {row['resident']}"
        for row in rows
    ]
    for name, marker in (("TRITON_ATTN", "o"), ("FLASH_ATTN", "D")):
        points = [
            (row["us"]["sink_paged"] / row["us"][name], label)
            for row, label in zip(rows, labels, strict=True)
            if {name, "sink_paged"} <= set(row["us"])
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=f"over {name}")
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.margins(y=0.5 / max(1, len(rows)))
    axes.tick_params(labelsize=7)
    axes.set_xlabel("time of sink_paged over that of vLLM's kernel, below 1 is faster")
    axes.set_title("streams x tokens of each @ resident keys", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
