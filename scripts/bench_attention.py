# SPDX-License-Identifier: Apache-2.0
"""Time the CPU kernel of sink attention against vLLM's stock one, interleaved.

Stock attends a sequence of exactly the resident length; ours a stream far past its
window with the same number of resident keys. One process, the two kernels in turns;
the ratio is ours over stock, below 1 where ours is faster. With `--kv-cache-dtype` ours
reads and writes a cache of 8 bits: beside ours with a cache of the queries' dtype, and
beside stock where that has a kernel for it (AVX-512).

Both caches lie in pages of 4 KiB; with `--huge-pages` ours lies in those that our
worker asks for. What a step shares is prepared outside the call on both sides: our
`Step`, stock's scheduler metadata; what that costs a step is said first.

The floor: a decode reads every resident key and value once, so it cannot be faster than
`batch * resident * 2 * kv_heads * head_size * element_size` bytes over the bandwidth
of reading as much memory again and again; a prefill cannot be faster than
`4 * tokens * resident * heads * head_size` operations over the rate of a large matrix
product, of the same dtype or of float32, whichever is faster; a write reads its keys
and values once and writes them to the cache. Both rates are measured here, on the same
threads and in huge pages where they are used. What neighbours do to memory and caches
meanwhile makes a floor as uncertain as a cell.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from kernels.calls import make_calls
from kernels.cases import cases, peers
from kernels.rates import Rates, fastest, floor_us, measure
from kernels.shapes import SHAPES
from provenance import provenance
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from sink_paged.attention import cpu
from sink_paged.attention.cpu_backend import FP8_DTYPES
from sink_paged.attention.layer import Step


def measure_step(dtype: torch.dtype, block_size: int) -> tuple[float, float]:
    """What a step of 32 decodes costs (us) before its first layer, ours and stock."""
    starts = torch.arange(33, dtype=torch.int32)
    seq_lens = torch.full((32,), 2048, dtype=torch.int32)
    table = torch.zeros(32, 1 + 2048 // block_size, dtype=torch.int32)
    ours = fastest(lambda: Step.of(starts, seq_lens, table), 1000)
    stock = fastest(
        lambda: ops.cpu_attn_get_scheduler_metadata(
            num_reqs=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            seq_lens=seq_lens,
            dtype=dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=_get_attn_isa(dtype, block_size, 128),
            enable_kv_split=True,
        ),
        1000,
    )
    return ours * 1e6, stock * 1e6


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Ratios as horizontal bars with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(rows)))
    labels = [
        f"{r['dtype']} {r['kv_cache_dtype']} {r['shape']} {r['batch']} x {r['tokens']} "
        f"@ {r['resident']} / {r['peer']}"
        for r in rows
    ]
    ratios = [float(str(r["ratio"])) for r in rows]
    low = [float(str(r["ratio"])) - float(str(r["ratio_p10"])) for r in rows]
    high = [float(str(r["ratio_p90"])) - float(str(r["ratio"])) for r in rows]
    colors = ["tab:green" if ratio <= 1 else "tab:red" for ratio in ratios]
    axes.barh(labels, ratios, xerr=[low, high], color=colors)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(y=0.5 / len(rows))
    axes.tick_params(labelsize=7)
    axes.set_xlabel("time of sink attention / time of its peer")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the sweep, print the table, write `attention.json` and `attention.png`."""
    parser = argparse.ArgumentParser(description="sink attention against stock, CPU")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=["auto", *FP8_DTYPES]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--block-size", type=int, default=128, help="of both caches (vLLM: 128)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="our cache in huge pages, as our worker allocates it; stock's never is",
    )
    parser.add_argument("--quick", action="store_true", help="a short sweep")
    parser.add_argument("--output-dir", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    current_platform.import_kernels()
    cpu.prepare(torch.float32)
    rows: list[dict[str, object]] = []
    print(
        f"{'dtype':9s}{'shape':14s}{'batch':>6s}{'tokens':>7s}{'keys':>6s}"
        f"{'ours us':>11s}{'peer us':>11s}{'floor us':>11s}{'ratio':>7s}  "
        "p10-p90    peer"
    )
    for dtype in options.dtype:
        rates = Rates(getattr(torch, dtype), options.huge_pages)
        ours, stock = measure_step(getattr(torch, dtype), options.block_size)
        print(f"{dtype:9s}a step of 32 decodes: ours {ours:.1f} us, stock {stock:.1f}")
        cache_dtype, block_size = options.kv_cache_dtype, options.block_size
        compared = {
            shape: peers(dtype, block_size, cache_dtype, shape)
            for shape in options.shapes
        }
        for case in (
            replace(point, kv_cache_dtype=cache_dtype, peer=peer)
            for point in cases(dtype, block_size, options.shapes, options.quick)
            for peer in compared[point.shape]
        ):
            calls = make_calls(case, options.huge_pages)
            result = measure(*calls, options.seconds)
            floor = floor_us(case, rates)
            rows.append({**asdict(case), **result, "floor_us": floor})
            print(
                f"{dtype:9s}{case.shape:14s}{case.batch:6d}{case.tokens:7d}"
                f"{case.resident:6d}{result['ours_us']:11.1f}"
                f"{result['peer_us']:11.1f}{floor:11.1f}{result['ratio']:7.2f}"
                f"  {result['ratio_p10']:.2f}-{result['ratio_p90']:.2f}  "
                f"{'stock' if case.peer == 'stock' else f'ours, {dtype} cache'}",
                flush=True,
            )
    if options.output_dir:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        document = {"provenance": provenance(), "results": rows}
        path = options.output_dir / "attention.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
        plot(rows, options.output_dir / "attention.png")


if __name__ == "__main__":
    main()
