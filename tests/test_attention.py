# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel against the reference, and the reference against its definition."""

import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from sink_paged.attention import cpu, launch, reference
from sink_paged.attention.layer import LayerAttention, Step
from sink_paged.window import BlockWindow, SinkWindow
from tests.attention_batches import (
    CACHES,
    DTYPES,
    E4M3,
    E5M2,
    MIXED,
    OPTIONS,
    Batch,
    batches,
    quantise,
)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize(
    ("sinks", "block_size"),
    [(0, 16), (1, 32), (4, 48), (17, 128), (17, 16), (40, 16), (40, 32), (4, 128)],
)
def test_mixed_batch(
    threads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    sinks: int,
    block_size: int,
) -> None:
    """Queries below, at and beyond C, of prefill chunks and decodes in one call."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Batch(
            MIXED,
            SinkWindow(sinks, 60),
            block_size=block_size,
            dtype=dtype,
            cache_dtype=cache_dtype,
            rotary_dim=64,
        ).check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize(
    "head_size", [16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]
)
def test_head_sizes(
    dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int
) -> None:
    """Every head size, with the rotation of all its dims."""
    chunks = [(1, 200), (13, 150)]
    Batch(
        chunks,
        SinkWindow(4, 70),
        head_size=head_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        rotary_dim=head_size,
    ).check()


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(1, 1), (5, 5), (8, 2), (6, 2), (9, 3), (71, 1)]
)
def test_head_layouts(
    dtype: torch.dtype, cache_dtype: torch.dtype, num_heads: int, num_kv_heads: int
) -> None:
    """Multi-head, grouped and multi-query attention."""
    Batch(
        [(1, 100), (21, 130), (1, 30)],
        SinkWindow(4, 60),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
        cache_dtype=cache_dtype,
        rotary_dim=64,
    ).check()


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("chunk", [70, 150])
def test_long_chunks(dtype: torch.dtype, cache_dtype: torch.dtype, chunk: int) -> None:
    """Chunks of several query tiles over windows of several softmax updates."""
    Batch(
        [(chunk, 1500), (1, 1100), (chunk, chunk)],
        SinkWindow(4, 700),
        block_size=128,
        dtype=dtype,
        cache_dtype=cache_dtype,
        rotary_dim=64,
    ).check()


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize(
    ("sinks", "recent", "block_size"),
    [
        (4, 2500, 16),
        (40, 2500, 128),
        (300, 1500, 48),
        (1100, 1200, 32),
        (4, 2100, 2048),
    ],
)
def test_long_windows(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    sinks: int,
    recent: int,
    block_size: int,
) -> None:
    """Windows, and sinks, of several softmax updates, of few query rows and of many."""
    Batch(
        [(1, 6000), (1, 2000), (3, 5000), (20, 4000)],
        SinkWindow(sinks, recent),
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        rotary_dim=64,
    ).check()


def test_matrix_tiles() -> None:
    """The code for matrix tiles, with their products in software."""
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.matrix_tiles"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    products, accumulations = map(int, printed.split())
    assert products > 0 and accumulations > 0


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("rotary_dim", [0, 16, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    rotary_dim: int,
    options: dict[str, Any],
) -> None:
    """Biases, caps and rotary styles, alone and together."""
    Batch(
        MIXED,
        SinkWindow(4, 60),
        dtype=dtype,
        cache_dtype=cache_dtype,
        rotary_dim=rotary_dim,
        options=options,
    ).check()


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES[:-1], ids=str)
@pytest.mark.parametrize("block_size", [32, 96, 128, 2048])
@pytest.mark.parametrize("options", ["sink_logits", "all"])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 10), (4, 10), (32, 10), (4, 2200)])
def test_few_rows(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
    sinks: int,
    recent: int,
    options: str,
) -> None:
    """Decodes and short chunks, of streams from a few tokens to several updates."""
    Batch(
        [(1, 20), (4, 24), (1, 45), (3, 47), (1, 1030), (3, 2300), (1, 2500)],
        SinkWindow(sinks, recent),
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        rotary_dim=64,
        options=OPTIONS[options],
    ).check()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches())
def test_any_batch(batch: Batch) -> None:
    """Kernel and reference agree whatever the batch."""
    batch.check()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 4, 17])
@pytest.mark.parametrize(("chunk", "seq_len"), [(90, 90), (30, 120), (1, 24)])
def test_reference_is_the_definition(
    sinks: int, chunk: int, seq_len: int, interleaved: bool
) -> None:
    """The reference equals dense float64 attention on unrotated keys.

    Each pair of query and key is rotated by its slot distance, `SinkWindow.distance`,
    which is what StreamingLLM defines; nothing is paged and nothing rotated twice.
    """
    rotary_dim, slopes = 16, torch.tensor([0.3, 0.05])
    window = SinkWindow(sinks, 20)
    batch = Batch(
        [(chunk, seq_len)],
        window,
        num_heads=2,
        num_kv_heads=1,
        head_size=32,
        rotary_dim=rotary_dim,
        options={
            "interleaved": interleaved,
            "alibi_slopes": slopes,
            "soft_cap": 3.0,
            "sink_logits": torch.tensor([0.5, -1.0]),
        },
    )
    frequencies = 10.0 ** -torch.linspace(0, 2, rotary_dim // 2, dtype=torch.float64)

    def turn(rows: Tensor, positions: Tensor) -> Tensor:
        """Rotate rows `[tokens, heads, head_size]` to their positions."""
        angles = (positions[:, None] * frequencies)[:, None]
        return reference.rotate(
            rows, angles.cos(), angles.sin(), interleaved=interleaved
        )

    texts = torch.arange(seq_len)
    queries = torch.arange(seq_len - chunk, seq_len)
    plain_key, value = (text.double() for text in batch.texts[0])
    plain_query = batch.query[:chunk].double()

    slots = torch.full((seq_len,), -1)
    policy = BlockWindow(window, batch.block_size)
    for j in range(seq_len):
        column = policy.column(j // batch.block_size, batch.block_table.shape[1])
        if any(window.attends(i, j) for i in queries.tolist()):
            number = int(batch.block_table[0, column])
            slots[j] = number * batch.block_size + j % batch.block_size
    key = turn(plain_key, texts).float()
    cpu.write_kv(key, value.float(), batch.kv_cache, slots)
    batch.query = batch.query.clone()
    batch.query[:chunk] = turn(plain_query, queries).float()
    angles = (queries.clamp(max=window.capacity) - queries)[:, None] * frequencies
    batch.sink_rotation = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    actual = batch.run(reference.sink_attention)[:chunk]

    expected = torch.zeros(chunk, 2, 32, dtype=torch.float64)
    for row, i in enumerate(queries.tolist()):
        attended = [j for j in range(seq_len) if window.attends(i, j)]
        distances = torch.tensor([window.distance(i, j) for j in attended])
        for head in range(2):
            rows = plain_query[row, head].expand(len(attended), 1, -1)
            turned = turn(rows, distances)[:, 0]
            logits = (turned * plain_key[attended, 0]).sum(1) * 32**-0.5
            logits = 3.0 * torch.tanh(logits / 3.0) - slopes[head] * distances
            weights = logits.exp()
            extra = batch.options["sink_logits"][head].double().exp()
            weights = weights / (weights.sum() + extra)
            expected[row, head] = weights @ value[attended, 0]
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_size", "head_size"), [(16, 16), (48, 80), (128, 64)])
def test_write_then_read(dtype: torch.dtype, block_size: int, head_size: int) -> None:
    """Every written slot reads back exactly; padding writes nothing."""
    cache = torch.full((5, 3, block_size, 2 * head_size), math.nan, dtype=dtype)
    slots = torch.randperm(5 * block_size)[: 3 * block_size]
    slots[::7] = -1
    # Key and value interleaved, so that neither is contiguous.
    both = torch.randn(len(slots), 3, 2, head_size).to(dtype)
    key, value = both[:, :, 0], both[:, :, 1]
    with torch.inference_mode():
        cpu.write_kv(key, value, cache, slots)
    keys, values = cpu.read_kv(cache)
    written = torch.zeros(5 * block_size, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            written[slot] = True
            block, offset = divmod(slot, block_size)
            assert torch.equal(keys[block, :, offset], key[token])
            assert torch.equal(values[block, :, offset], value[token])
    untouched = ~written.view(5, 1, block_size, 1).expand_as(keys)
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [E4M3, E5M2], ids=str)
def test_8_bits_are_those_of_torch(
    threads: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """Bit for bit: numbers of every size, ties, zeros, infinities, NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(cache_dtype).float()
    codes = codes[codes.isfinite()].sort().values
    sizes = 10.0 ** torch.linspace(-6, 6, 25)
    numbers = torch.cat(
        [
            codes,
            (codes[1:] + codes[:-1]) / 2,
            (torch.randn(1000, 1) * sizes).flatten(),
            torch.tensor([-0.0, math.inf, -math.inf, math.nan]),
        ]
    )
    block_size, head_size = 48, 80
    numbers = numbers[torch.randperm(len(numbers))]
    numbers = numbers[: len(numbers) // (6 * head_size) * 6 * head_size]
    key, value = numbers.to(dtype).view(-1, 3, 2, head_size).unbind(2)
    cache = torch.zeros(5, 3, block_size, 2 * head_size).to(cache_dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scales in ((1.0, 1.0), (0.02, 7.0)):
            slots = torch.randperm(5 * block_size)[: len(key)]
            cpu.write_kv(key, value, cache, slots, k_scale=scales[0], v_scale=scales[1])
            for x, scale, held in zip(
                (key, value), scales, cpu.read_kv(cache), strict=True
            ):
                held = held.transpose(1, 2).flatten(0, 1)[slots]
                expected = quantise(x, scale, cache_dtype)
                assert torch.equal(held.view(torch.uint8), expected.view(torch.uint8))
    finally:
        torch.set_num_threads(before)


def test_dtypes_that_do_not_match_are_refused() -> None:
    """Queries and a cache of two dtypes of 16 bits or more have no kernel."""
    batch = Batch([(1, 20)], SinkWindow(4, 60), dtype=torch.bfloat16)
    batch.query = batch.query.float()
    with pytest.raises(ValueError, match="float32, a cache of torch.bfloat16"):
        batch.run(cpu.sink_attention)


def test_flat_output_in_inference_mode() -> None:
    """An output of `[num_tokens, num_heads * head_size]` is filled alike."""
    batch = Batch(MIXED, SinkWindow(4, 60), rotary_dim=64)
    expected = batch.run(cpu.sink_attention)

    def flat(
        query: Tensor, cache: Tensor, output: Tensor, *args: Any, **kw: Any
    ) -> None:
        with torch.inference_mode():
            cpu.sink_attention(query, cache, output.view(len(output), -1), *args, **kw)

    assert torch.equal(batch.run(flat), expected)


def run_python(code: str, tmp_path: Path, **environment: str) -> str:
    """Output of a fresh interpreter on a copy of the package in `tmp_path`."""
    package = tmp_path / "sink_paged"
    if not package.exists():
        source = Path(cpu.__file__).parents[1]
        shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


LOAD = """
import logging
logging.basicConfig(level=logging.INFO)
from sink_paged.attention import launch
kernels = launch.load_kernels()
print(kernels.attend.cache_hits, kernels.store.cache_hits)
"""


@pytest.mark.slow
def test_cache_knows_every_source(tmp_path: Path) -> None:
    """Kernels load from the cache until any file they are made of changes."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = run_python(LOAD, tmp_path, **cache)
    assert first.split()[-2:] == ["0", "0"]
    assert "Compiling the attention kernel" in first
    again = run_python(LOAD, tmp_path, **cache)
    assert again.split()[-2:] == ["1", "1"]
    assert "Compiling" not in again
    with (tmp_path / "sink_paged/attention/softmax.py").open("a") as file:
        file.write("# another text\n")
    assert run_python(LOAD, tmp_path, **cache).split()[-2:] == ["0", "0"]


@pytest.mark.slow
def test_no_cache_to_write(tmp_path: Path) -> None:
    """Where no directory takes the cache, kernels are compiled without one."""
    run_python("", tmp_path)
    # Files where directories should be, which stop the superuser too.
    (tmp_path / "sink_paged/attention/__pycache__").touch()
    (tmp_path / "home").touch()
    home = str(tmp_path / "home")
    output = run_python(
        LOAD, tmp_path, XDG_CACHE_HOME=home, HOME=home, NUMBA_CACHE_DIR=""
    )
    assert output.split()[-2:] == ["0", "0"]
    assert not list(tmp_path.rglob("*.nbc"))


def test_sources_are_complete() -> None:
    """The cache's key covers every module that holds a part of a kernel."""
    folder = Path(cpu.__file__).parent
    inside = {
        path.name
        for path in folder.glob("*.py")
        if re.search(r"^@jit|import jit|^ITEM", path.read_text(), re.MULTILINE)
        or "llvmlite" in path.read_text()
    }
    assert inside <= set(launch.SOURCES)


def test_prepare_refuses_other_dtypes() -> None:
    """A dtype without a kernel is an error when the model is built."""
    cpu.prepare(torch.bfloat16)
    with pytest.raises(ValueError, match="float64"):
        cpu.prepare(torch.float64)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize(("num_heads", "threads"), [(71, 2), (4, 3), (1, 7)])
@pytest.mark.parametrize("option", ["sink_logits", "alibi_slopes"])
def test_split_keys(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    threads: int,
    option: str,
) -> None:
    """A single stream whose keys are shared by several threads, twice in a row."""
    values = OPTIONS["all"][option].repeat(-(-num_heads // 4))[:num_heads]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seq_len in (1500, 40):
            Batch(
                [(1, seq_len)],
                SinkWindow(40, 900),
                num_heads=num_heads,
                num_kv_heads=1,
                block_size=48 if threads == 3 else 128,
                dtype=dtype,
                cache_dtype=cache_dtype,
                rotary_dim=64,
                options={option: values},
            ).check()
    finally:
        torch.set_num_threads(before)


def prepared(batch: Batch) -> Callable[[], Tensor]:
    """A layer's call on a batch, bound to the calling thread and its threads."""
    layer = LayerAttention(
        batch.num_heads, window=batch.window, scale=batch.head_size**-0.5
    )
    step = Step.of(batch.query_start_loc, batch.seq_lens, batch.block_table)

    def attend() -> Tensor:
        output = torch.zeros(batch.query.shape)
        layer.attend(batch.query, batch.kv_cache, output, step, batch.sink_rotation)
        return output

    attend()
    return attend


def test_layers_of_two_threads() -> None:
    """Layers that one thread has called first may be called by a thread each."""
    batches = [
        Batch([(40, 300), (1, 200)], SinkWindow(4, 60), rotary_dim=64, seed=seed)
        for seed in (0, 1)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = [prepared(batch) for batch in batches]
        expected = [call() for call in calls]
        start = threading.Barrier(2)

        def count_wrong(number: int) -> int:
            start.wait()
            wrong = 0
            for _ in range(1000):
                wrong += not torch.equal(calls[number](), expected[number])
            return wrong

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(count_wrong, (0, 1))) == [0, 0]
    finally:
        torch.set_num_threads(before)


def test_layers_with_other_numbers_of_threads() -> None:
    """A layer counts arrived parts apart from those that share its scratch memory."""
    window = SinkWindow(4, 4000)
    many, few = (
        Batch([(1, 4500)], window, num_heads=heads, num_kv_heads=heads, rotary_dim=64)
        for heads in (10, 1)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(16)  # ten tiles, of which each is split in two
        attend = prepared(many)
        expected = attend()
        torch.set_num_threads(4)
        prepared(few)()
        assert torch.equal(attend(), expected)
    finally:
        torch.set_num_threads(before)
