# SPDX-License-Identifier: Apache-2.0
"""Check the CPU kernel's code for matrix tiles (AMX) on a CPU that has none.

``python -m tests.matrix_tiles`` compiles the kernel with the products of tiles in
software, checks batches of bfloat16 against the reference, and prints how many products
the kernel asked for. It must be a process of its own: what it compiles is not the
kernel of this machine.
"""

import ctypes
import os
import shutil
import tempfile

os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from numba import types

from sink_paged.attention import layer, tiles
from sink_paged.attention.few import (
    SEGMENT,
    STRIP,
    TILES,
    VALUES,
    WEIGHTS,
)
from sink_paged.attention.simd import (
    F32,
    fetch_add,
    jit,
    load_f32,
    load_i32,
    load_i64,
    primitive,
    store_f32,
)
from sink_paged.window import SinkWindow
from tests.attention_batches import MIXED, OPTIONS, Batch

PRODUCTS, ACCUMULATIONS = ctypes.c_int64(0), ctypes.c_int64(0)
_PRODUCTS, _ACCUMULATIONS = map(ctypes.addressof, (PRODUCTS, ACCUMULATIONS))

_as_float = primitive(
    types.float32, (types.int32,), lambda builder, bits: builder.bitcast(bits, F32)
)


@jit
def tile_block(
    rows: int,
    vectors: int,
    a: int,
    lda: int,
    b: int,
    row_stride: int,
    vector_stride: int,
    depth_stride: int,
    c: int,
    ldc: int,
    depth: int,
    accumulate: int,
    ahead: int,
    ahead_stride: int,
) -> None:
    """As ``tiles._tile_block``."""
    _ = ahead + ahead_stride
    fetch_add(_PRODUCTS, 1)
    for r in range(16 * rows):
        for n in range(16 * vectors):
            at = c + r * ldc + 4 * n
            column = b + n // 16 * vector_stride + n % 16 * 4
            total = load_f32(at) if accumulate != 0 else types.float32(0)
            for k in range(depth):
                for line in range(16):
                    x = load_i32(a + r * lda + 64 * k + 4 * line)
                    y = load_i32(column + k * depth_stride + line * row_stride)
                    first = _as_float(types.int32(x << 16))
                    total += first * _as_float(types.int32(y << 16))
                    second = _as_float(types.int32(x & -65536))
                    total += second * _as_float(types.int32(y & -65536))
            store_f32(at, total)


@jit
def accumulate_two(
    lda: int,
    segments: int,
    count: int,
    strip_number: int,
    c: int,
    ldc: int,
    last_ahead: int,
    last_stride: int,
) -> None:
    """As ``tiles._accumulate_two``."""
    for n in range(count):
        fetch_add(_ACCUMULATIONS, 1)
        segment = segments + n * SEGMENT
        strip = load_i64(segment + STRIP)
        tile_block(
            1,
            2,
            load_i64(segment + WEIGHTS),
            lda,
            load_i64(segment + VALUES) + strip_number * strip,
            64,
            strip,
            1024,
            c,
            ldc,
            load_i64(segment + TILES),
            1,
            last_ahead,
            last_stride,
        )


def main() -> None:
    """Check the batches."""
    tiles.HAS_AMX = False
    tiles._tile_block, tiles._accumulate_two = tile_block, accumulate_two
    layer.has_matrix_tiles = lambda: True
    shared = {"dtype": torch.bfloat16, "rotary_dim": 64}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for sinks, block_size in [(0, 32), (4, 16), (4, 48), (17, 32), (40, 32)]:
            window = SinkWindow(sinks, 60)
            Batch(MIXED, window, block_size=block_size, **shared).check()
    for num_heads, num_kv_heads in [(1, 1), (6, 2), (9, 3), (71, 1)]:
        Batch(
            [(1, 100), (21, 130), (1, 30)],
            SinkWindow(4, 60),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_size=32,
            **shared,
        ).check()
    for sinks, recent, block_size in [(4, 2500, 32), (300, 1500, 32), (40, 700, 2048)]:
        Batch(
            [(1, 6000), (3, 5000), (20, 4000)],
            SinkWindow(sinks, recent),
            block_size=block_size,
            **shared,
        ).check()
    for options in OPTIONS.values():
        Batch(
            MIXED, SinkWindow(4, 60), block_size=32, options=options, **shared
        ).check()
    # An accumulation is one of the products too.
    print(PRODUCTS.value - ACCUMULATIONS.value, ACCUMULATIONS.value)


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(os.environ["NUMBA_CACHE_DIR"])
