# SPDX-License-Identifier: Apache-2.0
"""Matrix product of bfloat16 on the CPU's matrix tiles (AMX).

A tile is 16 rows of 64 bytes: bfloat16 pairs in, float32 out.
"""

import functools
import itertools
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from sink_paged.attention.simd import (
    ADDRESS,
    I32,
    I64,
    call_llvm,
    emit_variants,
    jit,
    load,
    load_i32,
    offset_by,
    pointer_to,
    primitive,
    store_i32,
)


def _has_amx() -> bool:
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-bf16"))


HAS_AMX = _has_amx()


def _tile_call(builder: Any, name: str, *values: Any) -> None:
    if HAS_AMX:
        call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def _bytes_pointer(builder: Any, address: Any) -> Any:
    return pointer_to(builder, address, ir.IntType(8))


configure_tiles = primitive(
    types.void,
    (ADDRESS,),
    lambda builder, config: _tile_call(
        builder, "ldtilecfg", _bytes_pointer(builder, config)
    ),
)


@jit
def begin_tiles(config: int, rows: int) -> None:
    """Configure this thread's tiles, of `rows` <= 16 rows for A and C, 16 for B.

    Tiles 0 to 3 are C, 4 is A, 5 is A of a second 16 rows, 6 and 7 are B.

    64 bytes at `config` are scratch.
    """
    if load_i32(config) == 1 and load_i32(config + 48) == rows * 0x01010101:
        return
    for n in range(16):
        store_i32(config + 4 * n, 0)
    store_i32(config, 1)  # palette
    for n in range(4):
        store_i32(config + 16 + 4 * n, 64 + (64 << 16))  # bytes a row
    store_i32(config + 48, rows * 0x01010101)
    store_i32(config + 52, rows + 0x10101000)
    configure_tiles(config)


end_tiles = primitive(
    types.void, (), lambda builder: _tile_call(builder, "tilerelease")
)


def _number(number: int) -> Any:
    return ir.Constant(ir.IntType(8), number)


def _prefetch_tile(builder: Any, address: Any) -> None:
    flags = [ir.Constant(I32, n) for n in (0, 3, 1)]
    for line in range(16):
        pointer = _bytes_pointer(builder, offset_by(builder, address, 64 * line))
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)


def _prefetch_tiles(builder: Any, address: Any, vectors: int, stride: Any) -> None:
    """Few query rows read the cache once: memory is the limit, and is asked early."""
    for v in range(vectors):
        offset = builder.mul(stride, ir.Constant(I64, v))
        _prefetch_tile(builder, builder.add(address, offset))


def _tile_product(builder: Any, rows: int, vectors: int, args: Any) -> None:
    """Emit `C[16 * rows, 16 * vectors] (+)= A[., 32 * depth] @ B`; tiles 0-3 are C."""
    a, lda, b, row_stride, vector_stride, depth_stride, c, ldc, *rest = args
    depth, accumulate, ahead, ahead_stride = rest
    tiles = [(r, v, rows * v + r) for r in range(rows) for v in range(vectors)]

    def at(base: Any, count: int, stride: Any) -> Any:
        address = builder.add(base, builder.mul(stride, ir.Constant(I64, count)))
        return _bytes_pointer(builder, address)

    def corner(r: int, v: int) -> Any:
        return at(offset_by(builder, c, 64 * v), 16 * r, ldc)

    keep = builder.icmp_signed("!=", accumulate, ir.Constant(I64, 0))
    with builder.if_else(keep) as (known, clear):
        with known:
            for r, v, number in tiles:
                _tile_call(builder, "tileloadd64", _number(number), corner(r, v), ldc)
        with clear:
            for _, _, number in tiles:
                _tile_call(builder, "tilezero", _number(number))
    with cgutils.for_range(builder, depth) as loop:
        step_a = builder.add(a, builder.mul(loop.index, ir.Constant(I64, 64)))
        step_b = builder.add(b, builder.mul(loop.index, depth_stride))
        if rows == 1:
            _prefetch_tiles(builder, builder.add(step_b, ahead), vectors, ahead_stride)
        for r in range(rows):
            tile_a = _number(4 + r)
            _tile_call(builder, "tileloadd64", tile_a, at(step_a, 16 * r, lda), lda)
        for v in range(vectors):
            tile_b = _number(6 + v)
            source = at(step_b, v, vector_stride)
            _tile_call(builder, "tileloadd64", tile_b, source, row_stride)
            for r in range(rows):
                number = _number(rows * v + r)
                _tile_call(builder, "tdpbf16ps", number, _number(4 + r), tile_b)
    for r, v, number in tiles:
        _tile_call(builder, "tilestored64", _number(number), corner(r, v), ldc)


def _emit_tile_product(builder: Any, rows: Any, vectors: Any, *args: Any) -> None:
    variants = list(itertools.product((1, 2), (1, 2)))
    case = builder.add(builder.mul(rows, ir.Constant(I64, 10)), vectors)
    emit_variants(
        builder,
        case,
        {
            10 * rows + vectors: functools.partial(
                _tile_product, rows=rows, vectors=vectors
            )
            for rows, vectors in variants
        },
        "sink_paged.tiles",
        args,
    )


_tile_block = primitive(types.void, (types.int64,) * 14, _emit_tile_product)


def _emit_accumulate(builder: Any, *args: Any) -> None:
    """Emit two strips of `accumulate_tiles`: tiles 0 and 1 are C, 4 is A."""
    lda, segments, count, strip_number, c, ldc, last_ahead, last_stride = args

    def word(segment: Any, n: int) -> Any:
        return load(builder, offset_by(builder, segment, 8 * n), I64)

    second = offset_by(builder, c, 64)
    for tile, corner in enumerate((c, second)):
        pointer = _bytes_pointer(builder, corner)
        _tile_call(builder, "tileloadd64", _number(tile), pointer, ldc)
    with cgutils.for_range(builder, count) as loop:
        segment = builder.add(segments, builder.shl(loop.index, ir.Constant(I64, 6)))
        address, strip, depth, a, ahead, ahead_strip = (
            word(segment, n) for n in range(6)
        )
        address = builder.add(address, builder.mul(strip, strip_number))
        ahead = builder.add(ahead, builder.mul(ahead_strip, strip_number))
        following = builder.add(loop.index, ir.Constant(I64, 1))
        replaced = builder.and_(
            builder.icmp_signed("==", following, count),
            builder.icmp_signed("!=", last_ahead, ir.Constant(I64, 0)),
        )
        ahead = builder.select(replaced, last_ahead, ahead)
        ahead_strip = builder.select(replaced, last_stride, ahead_strip)
        with cgutils.for_range(builder, depth) as tiles:
            step = builder.shl(tiles.index, ir.Constant(I64, 10))
            first_ahead = builder.add(ahead, step)
            _prefetch_tile(builder, first_ahead)
            _prefetch_tile(builder, builder.add(first_ahead, ahead_strip))
            column = builder.shl(tiles.index, ir.Constant(I64, 6))
            weights = _bytes_pointer(builder, builder.add(a, column))
            _tile_call(builder, "tileloadd64", _number(4), weights, lda)
            source = builder.add(address, step)
            for tile in range(2):
                line = ir.Constant(I64, 64)
                pointer = _bytes_pointer(builder, source)
                _tile_call(builder, "tileloadd64", _number(6 + tile), pointer, line)
                numbers = (_number(tile), _number(4), _number(6 + tile))
                _tile_call(builder, "tdpbf16ps", *numbers)
                source = builder.add(source, strip)
    for tile, corner in enumerate((c, second)):
        pointer = _bytes_pointer(builder, corner)
        _tile_call(builder, "tilestored64", _number(tile), pointer, ldc)


_accumulate_two = primitive(types.void, (types.int64,) * 8, _emit_accumulate)


@jit
def accumulate_tiles(
    lda: int,
    segments: int,
    count: int,
    strips: int,
    c: int,
    ldc: int,
    following: int,
    following_stride: int,
) -> None:
    """Add the products of weights and values of segments: `C[rows, 16 * strips] +=`.

    A segment is six words of 64 bytes: where its values lie, the distance of their
    strips, how many tiles of 32 values, where their weights lie (bfloat16, rows `lda`
    apart), and the place and strip distance of what is read after it and asked for
    meanwhile; after the last values, two vectors at `following`. Strips are even.
    """
    for n in range(0, strips, 2):
        ahead = following if n + 2 == strips else types.int64(0)
        at = c + 64 * n
        _accumulate_two(lda, segments, count, n, at, ldc, ahead, following_stride)


@jit
def multiply_tiles(
    a: int,
    lda: int,
    b: int,
    row_stride: int,
    vector_stride: int,
    depth_stride: int,
    c: int,
    ldc: int,
    rows: int,
    vectors: int,
    depth: int,
    keep: int,
    next_b: int,
    next_stride: int,
) -> None:
    """Product `C[16 * rows, 16 * vectors] (+)= A[16 * rows, 32 * depth] @ B` on tiles.

    A and B are bfloat16, C float32. Tile (k, n) of B has its 16 rows of 16 pairs at
    `b + k * depth_stride + n * vector_stride`, `row_stride` apart. Strides are bytes.
    `keep = 0` overwrites C. Only between `begin_tiles` and `end_tiles`.

    Few rows ask early for the tiles that they read next: behind the last vectors of
    this product, those at `next_b`, `next_stride` apart.
    """
    v = 0
    while v < vectors:
        width = 2 if v + 2 <= vectors else 1
        ahead, ahead_stride = width * vector_stride, vector_stride
        if v + width >= vectors:
            ahead, ahead_stride = next_b - b - v * vector_stride, next_stride
        r = 0
        while r < rows:
            height = 2 if r + 2 <= rows else 1
            _tile_block(
                height,
                width,
                a + 16 * r * lda,
                lda,
                b + v * vector_stride,
                row_stride,
                vector_stride,
                depth_stride,
                c + 16 * r * ldc + 64 * v,
                ldc,
                depth,
                keep,
                ahead,
                ahead_stride,
            )
            r += height
        v += width
