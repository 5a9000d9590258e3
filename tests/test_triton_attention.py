# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against the reference, in Triton's interpreter or on a GPU."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from triton.runtime import interpreter
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from sink_paged.attention import cpu, flash, reference
from sink_paged.attention import triton as kernel
from sink_paged.attention.triton_backend import SinkTritonMetadataBuilder
from sink_paged.window import BlockWindow, SinkWindow, cdiv
from tests.attention_batches import (
    DTYPES,
    MIXED,
    OPTIONS,
    SAME,
    TOLERANCE,
    Batch,
    batches,
    store,
    window_attention,
)

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")

# The tanh of the cap saturates where an exponential overflows; a part of a split that
# saw no key has no output to divide.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide"),
]


@pytest.fixture(autouse=True, scope="module")
def bfloat16_products() -> Iterator[None]:
    """The interpreter holds bfloat16 as integers and multiplies those: widen them."""
    original = interpreter.InterpreterBuilder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return original(self, widen(a), widen(b), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def packed(batch: Batch, layout: str) -> Tensor:
    """The batch's cache as vLLM packs it on CUDA, unused slots and padding NaN."""
    keys, values = cpu.read_kv(batch.kv_cache)
    cache = torch.cat([keys, values], dim=-1)
    num_blocks, num_kv_heads, block_size, width = cache.shape
    if layout == "NHD":
        shape = (num_blocks, block_size, num_kv_heads + 1, width)
        storage = torch.full(shape, math.nan, dtype=cache.dtype, device=DEVICE)
        view = storage[:, :, :num_kv_heads].transpose(1, 2)
    else:
        shape = (num_blocks, num_kv_heads + 1, block_size, width)
        storage = torch.full(shape, math.nan, dtype=cache.dtype, device=DEVICE)
        view = storage[:, :num_kv_heads]
    return view.copy_(cache)


def run(
    batch: Batch,
    layout: str = "NHD",
    *,
    split: bool = False,
    cache: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """The kernel's output, on the CPU; `overrides` are arguments of the kernel."""
    cache = packed(batch, layout) if cache is None else cache
    output = torch.full(batch.query.shape, 7.0, dtype=batch.dtype, device=DEVICE)
    most = max(tokens for tokens, _ in batch.chunks)
    workspace = None
    if split:
        workspace = kernel.Workspace(
            batch.num_heads,
            batch.num_kv_heads,
            batch.head_size,
            DEVICE,
            max_query_len=most,
            programs=8 * len(batch.chunks) * batch.num_kv_heads,
        )
        for memory in (workspace.output, workspace.norm):
            memory.fill_(math.nan)
    arguments = {
        "query": batch.query,
        "kv_cache": cache,
        "output": output,
        "query_start_loc": batch.query_start_loc,
        "seq_lens": batch.seq_lens,
        "block_table": batch.block_table,
        "sink_rotation": batch.sink_rotation,
        "window": batch.window,
        "scale": batch.head_size**-0.5,
        "max_query_len": most,
        "workspace": workspace,
        **batch.options,
        **overrides,
    }
    kernel.sink_attention(
        **{
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
    )
    return output.cpu()


def check(batch: Batch, layout: str = "NHD", *, split: bool = False) -> None:
    """The kernel agrees with the reference; padded rows stay as they were."""
    expected = batch.run(reference.sink_attention).float()
    actual = run(batch, layout, split=split).float()
    tolerance = TOLERANCE[batch.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert (actual[-2:] == 7.0).all()


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    ("sinks", "block_size", "dtype"),
    [
        (0, 16, torch.float32),
        (1, 32, torch.bfloat16),
        (4, 48, torch.float16),
        (17, 128, torch.float32),
        (17, 16, torch.bfloat16),
        (40, 16, torch.float32),
        (40, 32, torch.float16),
        (4, 128, torch.bfloat16),
        (130, 16, torch.float32),
    ],
)
def test_mixed_batch(
    sinks: int, block_size: int, dtype: torch.dtype, layout: str
) -> None:
    """Queries below, at and beyond C, of prefill chunks and decodes in one call."""
    window = SinkWindow(sinks, 60)
    check(
        Batch(MIXED, window, block_size=block_size, dtype=dtype, rotary_dim=64), layout
    )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "head_size", [16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256]
)
def test_head_sizes(head_size: int, split: bool) -> None:
    """Every head size, with the rotation of all its dims and of a quarter of them."""
    chunks = [(1, 200), (1 if split else 13, 150)]
    for dtype, rotary_dim in (
        (torch.bfloat16, head_size),
        (torch.float32, head_size // 4),
    ):
        batch = Batch(
            chunks,
            SinkWindow(4, 70),
            head_size=head_size,
            dtype=dtype,
            rotary_dim=rotary_dim,
        )
        check(batch, split=split)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(1, 1), (5, 5), (8, 2), (6, 2), (9, 3), (71, 1), (150, 1)],
)
def test_head_layouts(num_heads: int, num_kv_heads: int, split: bool) -> None:
    """Multi-head, grouped and multi-query attention."""
    chunks = [(1, 100), (1, 30)] if split else [(1, 100), (21, 130), (1, 30)]
    batch = Batch(
        chunks,
        SinkWindow(4, 60),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rotary_dim=64,
    )
    check(batch, split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [70, 150])
def test_long_chunks(dtype: torch.dtype, chunk: int) -> None:
    """Chunks of several query tiles, whose inner key tiles need no mask."""
    batch = Batch(
        [(chunk, 1500), (1, 1100), (chunk, chunk)],
        SinkWindow(4, 700),
        num_heads=2,
        num_kv_heads=1,
        block_size=128,
        dtype=dtype,
        rotary_dim=64,
    )
    check(batch)


def test_unmasked_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in float32, whose own tiles have too few rows to leave masks out."""
    monkeypatch.setattr(kernel, "_plan", lambda *_: kernel._Launch(64, 32, 4, 3))
    batch = Batch(
        [(70, 1500), (1, 400), (35, 35)],
        SinkWindow(4, 300),
        num_heads=2,
        num_kv_heads=1,
        rotary_dim=64,
    )
    check(batch)


@pytest.mark.parametrize("rotary_dim", [0, 16, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(rotary_dim: int, options: dict[str, Any]) -> None:
    """Biases, caps and rotary styles, alone and together, of chunks and decodes."""
    window = SinkWindow(4, 60)
    dtypes = DTYPES if options is OPTIONS["all"] else [torch.float32]
    for dtype in dtypes:
        check(Batch(MIXED, window, dtype=dtype, rotary_dim=rotary_dim, options=options))
    decodes = [(1, end) for _, end in MIXED]
    batch = Batch(decodes, window, rotary_dim=rotary_dim, options=options)
    check(batch, split=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 96, 2048])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 10), (32, 10), (4, 2200)])
def test_split_keys(
    dtype: torch.dtype, block_size: int, sinks: int, recent: int
) -> None:
    """Decodes, also speculative ones, of streams from a few tokens to many tiles."""
    batch = Batch(
        [(1, 20), (4, 24), (1, 45), (3, 47), (1, 1030), (3, 2300)],
        SinkWindow(sinks, recent),
        num_heads=4,
        num_kv_heads=1,
        block_size=block_size,
        dtype=dtype,
        rotary_dim=64,
        options=OPTIONS["all"],
    )
    check(batch, split=True)
    tolerance = TOLERANCE[dtype]
    split, whole = run(batch, split=True), run(batch)
    torch.testing.assert_close(split, whole, atol=tolerance, rtol=tolerance)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(batches(SAME))
def test_any_batch(batch: Batch) -> None:
    """Kernel and reference agree whatever the batch."""
    check(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """An fp8 cache with scales, against the reference on the numbers it stands for."""
    batch = Batch(MIXED, SinkWindow(4, 60), dtype=dtype, rotary_dim=64)
    k_scale, v_scale = torch.tensor(0.02), torch.tensor(0.5)
    scales = torch.cat([k_scale.expand(64), v_scale.expand(64)])
    cache = (packed(batch, "HND").float() / scales.to(DEVICE)).to(cache_dtype)
    keys, values = (cache.float().cpu() * scales).chunk(2, dim=-1)
    shape = (*keys.shape[:3], 128)
    exact = torch.empty(shape)
    flat = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (keys, values)]
    store(*flat, exact, torch.arange(len(flat[0])))
    actual = run(batch, cache=cache, k_scale=k_scale, v_scale=v_scale).float()
    batch.kv_cache = exact
    expected = batch.run(reference.sink_attention).float()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("option", ["alibi", "sink_logits"])
def test_end_of_int32(split: bool, option: str) -> None:
    """The same attended tokens give the same result wherever the text stands."""
    chunks = [(1, 200)] if split else [(20, 200)]
    batch = Batch(chunks, SinkWindow(20, 60), rotary_dim=64, options=OPTIONS[option])
    near = run(batch, split=split)
    ring = batch.block_table.shape[1] - cdiv(20, batch.block_size)
    turn = ring * batch.block_size
    turns = (2**31 - 1 - 200) // turn
    batch.seq_lens += turns * turn
    assert batch.seq_lens[0] > 2**31 - 1 - turn
    assert torch.equal(run(batch, split=split), near)
    # The last token that a text may have.
    batch.seq_lens[0] = 2**31 - 1
    assert (
        not run(batch, split=split, cache=packed(batch, "HND").nan_to_num())
        .isnan()
        .any()
    )


@pytest.mark.parametrize("decode", [False, True])
def test_padded_requests(decode: bool) -> None:
    """Requests without rows touch nothing, whatever their lengths and tables say."""
    chunks = [(1, end) for _, end in MIXED] if decode else MIXED
    batch = Batch(chunks, SinkWindow(4, 60), rotary_dim=64)
    expected = run(batch, split=decode)
    end = batch.query_start_loc[-1:]
    batch.query_start_loc = torch.cat([batch.query_start_loc, end, end, end])
    stale = torch.tensor([0, 123456, -1], dtype=torch.int32)
    batch.seq_lens = torch.cat([batch.seq_lens, stale])
    nowhere = torch.full((3, batch.block_table.shape[1]), 2**30, dtype=torch.int32)
    batch.block_table = torch.cat([batch.block_table, nowhere])
    batch.chunks = [*batch.chunks, (0, 0), (0, 0), (0, 0)]
    torch.testing.assert_close(run(batch, split=decode), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("split", [False, True])
def test_a_key_that_is_no_number_is_seen(split: bool) -> None:
    """Also by the merge, which leaves out the parts of the keys that saw none."""
    batch = Batch([(1, 300)], SinkWindow(4, 250), rotary_dim=64)
    cache = packed(batch, "HND")
    block = int(batch.block_table[0, -1])
    cache[block, 0, 3, 5] = math.nan
    output = run(batch, cache=cache, split=split)[0]
    group = batch.num_heads // batch.num_kv_heads
    assert output[:group].isnan().all()
    assert output[group:].isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("sinks", "block_size", "head_size", "rotary_dim", "dtype"),
    [
        (0, 16, 128, 128, torch.bfloat16),
        (1, 32, 128, 64, torch.float16),
        (4, 48, 80, 80, torch.bfloat16),
        (17, 128, 96, 0, torch.float16),
        (40, 16, 128, 128, torch.float16),
        (130, 16, 256, 64, torch.bfloat16),
    ],
)
def test_route_through_flash_attention(
    sinks: int,
    block_size: int,
    head_size: int,
    rotary_dim: int,
    dtype: torch.dtype,
    interleaved: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its window and our sinks are the reference's sum, in a mixed batch too."""
    assert flash.suits(head_size, dtype, dtype)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(flash, "attend_window", window_attention)
    elif not flash.is_available():
        pytest.skip("no FlashAttention 3")
    window = SinkWindow(sinks, 60)
    options: dict[str, Any] = {"interleaved": interleaved}
    if interleaved:
        options["soft_cap"] = 20.0
    batch = Batch(
        [*MIXED, (200, 500)],
        window,
        block_size=block_size,
        head_size=head_size,
        rotary_dim=rotary_dim,
        dtype=dtype,
        options=options,
    )
    expected = batch.run(reference.sink_attention).float()
    end = batch.query_start_loc[-1:]  # a request without rows, which says nothing
    starts = torch.cat([batch.query_start_loc, end]).to(DEVICE)
    lengths = torch.cat([batch.seq_lens, torch.tensor([-5], dtype=torch.int32)])
    nowhere = torch.full((1, batch.block_table.shape[1]), 2**30, dtype=torch.int32)
    table = torch.cat([batch.block_table, nowhere]).to(DEVICE)
    cache = packed(batch, "HND").nan_to_num()  # FlashAttention multiplies what it masks
    unrolled = flash.window_table(
        starts,
        lengths.to(DEVICE),
        table,
        window=window,
        block_size=block_size,
        max_query_len=200,
    )
    assert unrolled.lengths[-1] == 0
    output = torch.full(batch.query.shape, 7.0, dtype=dtype, device=DEVICE)
    rotation = batch.sink_rotation
    flash.sink_attention(
        batch.query.to(DEVICE),
        cache,
        output,
        starts,
        lengths.to(DEVICE),
        table,
        None if rotation is None else rotation.to(DEVICE),
        unrolled=unrolled,
        window=window,
        scale=head_size**-0.5,
        max_query_len=200,
        **options,
    )
    actual = output.float().cpu()
    # The window's output is rounded before the sinks are added.
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert (actual[-2:] == 7.0).all()


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            numbers = [x for x in args if not isinstance(x, Tensor)]
            self.launches.append((grid, numbers, kwargs))

        return launch


@pytest.mark.parametrize("max_query_len", [1, 4, 100])
def test_launch_reads_no_tensor(
    monkeypatch: pytest.MonkeyPatch, max_query_len: int
) -> None:
    """A launch is decided without a single value of a tensor: these have none."""
    attend, merge = Recorder(), Recorder()
    monkeypatch.setattr(kernel, "attend", attend)
    monkeypatch.setattr(kernel, "merge", merge)
    meta = torch.device("meta")
    kernel.sink_attention(
        torch.empty(2 * max_query_len, 8, 64, device=meta),
        torch.empty(10, 2, 16, 128, device=meta),
        torch.empty(2 * max_query_len, 512, device=meta),
        torch.empty(3, dtype=torch.int32, device=meta),
        torch.empty(2, dtype=torch.int32, device=meta),
        torch.empty(2, 200, dtype=torch.int32, device=meta),
        torch.empty(512, 64, device=meta),
        window=SinkWindow(4, 2000),
        scale=0.125,
        k_scale=torch.empty((), device=meta),
        v_scale=torch.empty((), device=meta),
        max_query_len=max_query_len,
        workspace=kernel.Workspace(8, 2, 64, meta, max_query_len=max_query_len),
    )
    (grid, _, options), *others = attend.launches
    assert not others
    assert len(merge.launches) == options["is_split"] == (max_query_len <= 4)
    assert math.prod(grid) <= 300


def test_splits_follow_the_resident_keys() -> None:
    """Neither the workspace nor its use grows with the batch or a text."""
    workspace = kernel.Workspace(32, 8, 128, torch.device("meta"), programs=264)
    assert workspace.norm.numel() == 264 * 3 // 2 * 16
    for streams, splits in [(1, 32), (2, 16), (5, 4), (16, 2), (32, 1), (500, 1)]:
        assert workspace.splits(streams * 8, 16, 64) == splits
    assert workspace.splits(8, 16, 3) == 2
    assert workspace.splits(8, 32, 64) == 16


def test_graphs_take_no_window_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's table is a step's: a graph would replay that of its capture."""
    monkeypatch.setattr(flash, "is_available", lambda: True)
    model = SimpleNamespace(
        dtype=torch.bfloat16, get_num_attention_heads=lambda parallel: 8
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=None,
        num_speculative_tokens=3,
        compilation_config=SimpleNamespace(
            static_forward_context={},
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        ),
    )
    window = SinkWindow(4, 60)
    spec = SimpleNamespace(
        num_kv_heads=2,
        head_size=128,
        block_size=16,
        dtype=torch.bfloat16,
        blocks=BlockWindow(window, 16),
    )
    builder = SinkTritonMetadataBuilder(spec, [], config, DEVICE)

    def batch(tokens: int) -> CommonAttentionMetadata:
        starts = torch.arange(3, dtype=torch.int32) * tokens
        return CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE),
            query_start_loc_cpu=starts,
            seq_lens=torch.full((2,), 100, dtype=torch.int32, device=DEVICE),
            num_reqs=2,
            num_actual_tokens=2 * tokens,
            max_query_len=tokens,
            max_seq_len=100,
            block_table_tensor=torch.ones(2, 9, dtype=torch.int32, device=DEVICE),
            slot_mapping=torch.zeros(2 * tokens, dtype=torch.int64, device=DEVICE),
        )

    assert builder.uses_flash
    assert builder.workspace.max_query_len == 4  # a verification of three drafts
    for tokens in (1, 4, 5, 50):
        step, captured = builder.build(0, batch(tokens)), batch(tokens)
        assert (step.unrolled is not None) is (tokens > 4)
        assert builder.build_for_cudagraph_capture(captured).unrolled is None


@pytest.mark.slow
def test_compiles_for_gpus() -> None:
    """Every kind of launch compiles, spills nothing and fits 99 KiB a program.

    For Hopper and for Ada, which has no more than that.
    """
    listing = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.triton_targets"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    kernels = [json.loads(line) for line in listing.splitlines()]
    names = {record["kernel"] for record in kernels}
    assert names == {"attend", "merge", "add_sinks", "unroll"}
    for record in kernels:
        assert record["stack"] == 0, record
        assert record["shared_memory"] <= 99 << 10, record
