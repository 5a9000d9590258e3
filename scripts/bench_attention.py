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

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from provenance import provenance
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from sink_paged.attention import cpu
from sink_paged.attention.cpu_backend import FP8_DTYPES
from sink_paged.attention.layer import CacheWriter, LayerAttention, Step
from sink_paged.huge_pages import clear_to_huge_pages
from sink_paged.window import BlockWindow, SinkWindow

SINK_TOKENS = 4
SHAPES = {
    "32q/8kv x128": (32, 8, 128),
    "8/8 x64": (8, 8, 64),
    "32/32 x128": (32, 32, 128),
    "71/1 x64": (71, 1, 64),
}


@dataclass(frozen=True)
class Case:
    """One measured point.

    `resident` counts the keys of a request's last query; 0 is a write of new keys and
    values to the cache. `kv_cache_dtype` is that of vLLM's flag; `peer` is whom ours is
    compared with: stock, or ours with a cache of `dtype`.
    """

    shape: str
    batch: int
    tokens: int
    resident: int
    dtype: str
    block_size: int
    kv_cache_dtype: str = "auto"
    peer: str = "stock"

    @property
    def query_dtype(self) -> torch.dtype:
        """Dtype of queries, new keys and values, outputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the cache."""
        return FP8_DTYPES.get(self.kv_cache_dtype, self.query_dtype)

    @property
    def isa(self) -> str:
        """What stock vLLM would run it with.

        Raises:
            NotImplementedError: it has no kernel here.
        """
        head_size = SHAPES[self.shape][2]
        isa: str = _get_attn_isa(
            self.query_dtype, self.block_size, head_size, self.kv_cache_dtype
        )
        return isa


def make_ours(case: Case, huge_pages: bool) -> Callable[[], None]:
    """A call of this package's kernel on streams far past their window."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    block_size = case.block_size
    window = SinkWindow(SINK_TOKENS, case.resident - SINK_TOKENS - 1)
    policy = BlockWindow(window, block_size)
    columns = policy.max_blocks(case.tokens)
    seq_len = 10 * case.resident + 37
    num_blocks = 1 + case.batch * columns
    block = torch.randn(1, kv_heads, block_size, 2 * head_size).to(case.cache_dtype)
    cache = torch.zeros(num_blocks, *block.shape[1:], dtype=case.cache_dtype)
    if huge_pages:
        clear_to_huge_pages(cache)
    cache.copy_(block.expand_as(cache))
    table = torch.randperm(num_blocks - 1)[: case.batch * columns] + 1
    table = table.view(case.batch, columns).int()
    query = torch.randn(case.batch * case.tokens, heads, head_size)
    query = query.to(case.query_dtype)
    output = torch.empty_like(query)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.tokens
    seq_lens = torch.full((case.batch,), seq_len, dtype=torch.int32)
    angles = torch.randn(len(query), head_size // 2)
    rotation = torch.cat([angles.cos(), angles.sin()], dim=1)

    attention = LayerAttention(heads, window=window, scale=head_size**-0.5)
    step = Step.of(starts, seq_lens, table)

    def call() -> None:
        attention.attend(query, cache, output, step, rotation)

    return call


def make_stock(case: Case) -> Callable[[], None]:
    """A call of vLLM's kernel on sequences of the resident length."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    seq_len = case.resident + case.tokens - 1
    columns = -(-seq_len // case.block_size)
    num_blocks = 1 + case.batch * columns
    cache = torch.randn(1, kv_heads, 2 * case.block_size, head_size).to(
        case.cache_dtype
    )
    if case.kv_cache_dtype != "auto":
        cache = cache.view(torch.uint8)
    cache = cache.repeat(num_blocks, 1, 1, 1)
    key_cache, value_cache = cache.chunk(2, dim=2)
    table = (torch.randperm(num_blocks - 1) + 1).view(case.batch, columns).int()
    query = torch.randn(case.batch * case.tokens, heads, head_size)
    query = query.to(case.query_dtype)
    output = torch.empty_like(query)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.tokens
    seq_lens = torch.full((case.batch,), seq_len, dtype=torch.int32)
    # A prefill attends a window in both kernels; a decode its whole sequence.
    sliding = -1 if case.tokens == 1 else case.resident
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_size,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=sliding,
        isa=case.isa,
        enable_kv_split=True,
        kv_cache_dtype=case.kv_cache_dtype,
    )

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=seq_lens,
            scale=head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=sliding,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
            kv_cache_dtype=case.kv_cache_dtype,
        )

    return call


def measure_step(dtype: torch.dtype, block_size: int) -> tuple[float, float]:
    """What a step of 32 decodes costs (us) before its first layer, ours and stock."""
    starts = torch.arange(33, dtype=torch.int32)
    seq_lens = torch.full((32,), 2048, dtype=torch.int32)
    table = torch.zeros(32, 1 + 2048 // block_size, dtype=torch.int32)
    ours = _fastest(lambda: Step.of(starts, seq_lens, table), 1000)
    stock = _fastest(
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


def make_write(case: Case, by_stock: bool) -> Callable[[], None]:
    """A call of either kernel that writes new keys and values."""
    _, kv_heads, head_size = SHAPES[case.shape]
    block_size = case.block_size
    num_blocks = 1 + case.batch * -(-case.tokens // block_size)
    cache = torch.zeros(num_blocks, kv_heads, block_size, 2 * head_size)
    cache = cache.to(case.cache_dtype)
    blocks = torch.randperm(num_blocks - 1).view(case.batch, -1, 1) + 1
    slots = blocks * block_size + torch.arange(block_size)
    slots = slots.view(case.batch, -1)[:, : case.tokens].reshape(-1).contiguous()
    fused = torch.randn(len(slots), 2, kv_heads, head_size).to(case.query_dtype)
    key, value = fused.unbind(1)
    if not by_stock:
        writer = CacheWriter()
        return lambda: writer.write(key, value, cache, slots)
    if case.kv_cache_dtype != "auto":
        cache = cache.view(torch.uint8)
    halves = cache.view(num_blocks, kv_heads, 2 * block_size, head_size)
    key_cache, value_cache = halves.chunk(2, dim=2)
    isa = case.isa
    return lambda: ops.cpu_attn_reshape_and_cache(
        key,
        value,
        key_cache,
        value_cache,
        slots,
        isa,
        kv_cache_dtype=case.kv_cache_dtype,
    )


def make_calls(
    case: Case, huge_pages: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A call of our kernel, and one of its peer."""
    by_stock = case.peer == "stock"
    other = case if by_stock else replace(case, kv_cache_dtype="auto")
    if not case.resident:
        return make_write(case, False), make_write(other, by_stock)
    ours = make_ours(case, huge_pages)
    if by_stock:
        return ours, make_stock(other)
    return ours, make_ours(other, huge_pages)


def measure(case: Case, seconds: float, huge_pages: bool = False) -> dict[str, float]:
    """Median times (us) of ours and its peer in turns, and their ratio's spread."""
    ours, peer = make_calls(case, huge_pages)
    for call in (ours, peer, ours, peer):
        call()
    begin = time.perf_counter()
    ours()
    peer()
    repeats = max(2, min(50, int(0.002 / (time.perf_counter() - begin))))
    pairs: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(pairs) < 7 or time.perf_counter() < stop:
        times = []
        for call in (ours, peer):
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times.append((time.perf_counter() - begin) / repeats * 1e6)
        pairs.append((times[0], times[1]))
    ratios = sorted(ours / peer for ours, peer in pairs)
    return {
        "ours_us": statistics.median(ours for ours, _ in pairs),
        "peer_us": statistics.median(peer for _, peer in pairs),
        "ratio": statistics.median(ratios),
        "ratio_p10": ratios[len(ratios) // 10],
        "ratio_p90": ratios[-1 - len(ratios) // 10],
    }


class Rates:
    """Rates of this machine on torch's threads, each measured when first asked for."""

    def __init__(self, dtype: torch.dtype, huge_pages: bool) -> None:
        """Of matrix products of `dtype`, of memory in huge pages or not."""
        self._huge_pages = huge_pages
        self._bandwidths: dict[int, float] = {}
        self.operations = max(_product_rate(dtype), _product_rate(torch.float32))

    def bandwidth(self, nbytes: int) -> float:
        """Bytes/s of reading about `nbytes` again and again."""
        size = 1 << max(18, (nbytes - 1).bit_length())
        if size not in self._bandwidths:
            memory = torch.zeros(size // 4, dtype=torch.int32)
            if self._huge_pages:
                clear_to_huge_pages(memory)
            memory.add_(1)
            repeats = max(3, (1 << 28) // size)
            seconds = _fastest(memory.max, min(repeats, 200))
            self._bandwidths[size] = size / seconds
        return self._bandwidths[size]


def _product_rate(dtype: torch.dtype) -> float:
    """Operations/s of a large matrix product."""
    matrix = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / _fastest(lambda: matrix @ matrix, 8)


def _fastest(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def floor_us(case: Case, rates: Rates) -> float:
    """Lower bound of a call's time, see the module's docstring."""
    heads, kv_heads, head_size = SHAPES[case.shape]
    element = case.cache_dtype.itemsize
    if not case.resident:
        element += case.query_dtype.itemsize
    keys = case.batch * (case.tokens + max(0, case.resident - 1))
    nbytes = keys * 2 * kv_heads * head_size * element
    operations = 4 * case.batch * case.tokens * case.resident * heads * head_size
    return max(nbytes / rates.bandwidth(nbytes), operations / rates.operations) * 1e6


def peers(dtype: str, block_size: int, kv_cache_dtype: str, shape: str) -> list[str]:
    """Whom ours is compared with."""
    if kv_cache_dtype == "auto":
        return ["stock"]
    try:
        _ = Case(shape, 1, 1, 1, dtype, block_size, kv_cache_dtype).isa
    except NotImplementedError as reason:
        print(f"{dtype:9s}{shape}: no stock vLLM here: {reason}")
        return ["ours"]
    return ["ours", "stock"]


def cases(dtype: str, block_size: int, shapes: list[str], quick: bool) -> list[Case]:
    """The sweep: decodes over batch and resident keys, prefills at 2048, writes."""
    residents = [2048] if quick else [512, 2048, 4096]
    batches = [1, 8] if quick else [1, 8, 32]
    return [
        *(
            Case(shape, batch, 1, resident, dtype, block_size)
            for shape in shapes
            for batch in batches
            for resident in residents
        ),
        *(
            Case(shape, 1, tokens, 2048, dtype, block_size)
            for shape in shapes
            for tokens in ([128] if quick else [128, 512])
        ),
        *(
            Case(shape, batch, tokens, 0, dtype, block_size)
            for shape in shapes
            for batch, tokens in ([(8, 1)] if quick else [(1, 1), (32, 1), (1, 512)])
        ),
    ]


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
            result = measure(case, options.seconds, options.huge_pages)
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
