# SPDX-License-Identifier: Apache-2.0
"""Register-tiled matrix product on the raw memory of a page, for every dtype."""

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from sink_paged.attention.simd import (
    BFLOAT16,
    E4M3,
    E5M2,
    F32,
    FLOAT16,
    I64,
    LANES,
    VEC,
    VEC_I16,
    VEC_I32,
    constant,
    emit_variants,
    fma,
    int_constant,
    jit,
    load,
    offset_by,
    primitive,
    splat,
    store,
    widen,
)

# 16 lanes are one of 32 registers with AVX-512, else two of 16, which hold 6 sums of 16
# lanes, what they are multiplied with, and nothing else.
AVX512 = bool(llvm.get_host_cpu_features().get("avx512f"))
# Tiles: (kind, rows, vectors of 16 lanes).
_WIDE = [(k, r, v) for k in range(3) for r in (4, 2, 1) for v in (4, 2, 1)]
_WIDE += [(FLOAT16, 8, 2), (FLOAT16, 8, 1)]
_NARROW = [
    (k, r, v)
    for k in range(3)
    for r, v in ((6, 1), (4, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 4))
]
TILES = _WIDE if AVX512 else _NARROW
COPIED_VECTORS = 4  # of 8 bits that are copied as float16 at once
E4M3_FACTOR = 256.0  # of the float16 copies of E4M3, see `_copy_halves`


def _row_address(builder: Any, base: Any, stride: Any, row: int) -> Any:
    return builder.add(base, builder.mul(stride, ir.Constant(I64, row)))


def _product(builder: Any, kind: int, rows: int, vectors: int, args: Any) -> None:
    """Emit the micro-kernel `C[rows, 16 * vectors] (+)= A[rows, depth] @ B`."""
    a, lda, b, depth_stride, vector_stride, c, ldc, depth, accumulate = args
    step = 2 if kind == BFLOAT16 else 1
    rows_a = [_row_address(builder, a, lda, r) for r in range(rows)]
    rows_c = [_row_address(builder, c, ldc, r) for r in range(rows)]
    column = [builder.mul(vector_stride, ir.Constant(I64, n)) for n in range(vectors)]
    keep = builder.icmp_signed("!=", accumulate, ir.Constant(I64, 0))
    initial = [
        builder.select(
            keep, load(builder, offset_by(builder, rows_c[r], 64 * n), VEC), constant(0)
        )
        for r in range(rows)
        for n in range(vectors)
    ]

    def add(sums: list[Any], address: Any, offset: Any, both: bool) -> list[Any]:
        tiles: list[tuple[Any, ...]] = []
        for n in range(vectors):
            at = builder.add(address, column[n])
            if kind != BFLOAT16:
                tiles.append((widen(builder, kind, at),))
                continue
            pair = load(builder, at, VEC_I32)
            low = builder.shl(pair, int_constant(16))
            high = builder.and_(pair, int_constant(-65536))
            tiles.append((builder.bitcast(low, VEC), builder.bitcast(high, VEC)))
        sums = list(sums)
        for r in range(rows):
            for half in range(2 if kind == BFLOAT16 and both else 1):
                at = offset_by(builder, builder.add(rows_a[r], offset), 4 * half)
                value = splat(builder, load(builder, at, F32))
                for n in range(vectors):
                    i = r * vectors + n
                    sums[i] = fma(builder, value, tiles[n][half], sums[i])
        return sums

    entry = builder.block
    head = builder.append_basic_block("product.head")
    body = builder.append_basic_block("product.body")
    done = builder.append_basic_block("product.done")
    whole = builder.and_(depth, ir.Constant(I64, -step))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    address = builder.phi(I64)
    sums = [builder.phi(VEC) for _ in initial]
    index.add_incoming(ir.Constant(I64, 0), entry)
    address.add_incoming(b, entry)
    for phi, value in zip(sums, initial, strict=True):
        phi.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", index, whole), body, done)
    builder.position_at_end(body)
    offset = builder.shl(index, ir.Constant(I64, 2))
    updated = add(sums, address, offset, True)
    index.add_incoming(builder.add(index, ir.Constant(I64, step)), body)
    address.add_incoming(builder.add(address, depth_stride), body)
    for phi, value in zip(sums, updated, strict=True):
        phi.add_incoming(value, body)
    builder.branch(head)
    builder.position_at_end(done)

    def write(values: list[Any]) -> None:
        for r in range(rows):
            for n in range(vectors):
                at = offset_by(builder, rows_c[r], 64 * n)
                store(builder, values[r * vectors + n], at)

    if step == 1:
        write(sums)
        return
    offset = builder.shl(index, ir.Constant(I64, 2))
    with builder.if_else(builder.icmp_signed("<", index, depth)) as (odd, even):
        with odd:
            write(add(sums, address, offset, False))
        with even:
            write(sums)


def _emit_product(builder: Any, kind: Any, rows: Any, vectors: Any, *args: Any) -> None:
    tiles = builder.add(builder.mul(rows, ir.Constant(I64, 10)), vectors)
    case = builder.add(builder.mul(kind, ir.Constant(I64, 100)), tiles)
    variants = {
        100 * kind + 10 * rows + vectors: functools.partial(
            _product, kind=kind, rows=rows, vectors=vectors
        )
        for kind, rows, vectors in TILES
    }
    emit_variants(builder, case, variants, "sink_paged.product", args)


_product_tile = primitive(types.void, (types.int64,) * 12, _emit_product)


def _copy_halves(kind: int) -> Callable[..., Any]:
    """Copy 16 pairs of 8 bits, `count` times, as 16 firsts and 16 seconds in float16.

    8 bits are the upper bits of a float16: those of E5M2 its first 8, those of E4M3 all
    but the first of the exponent, which makes them `E4M3_FACTOR` too small, subnormal
    ones too; its NaN becomes what its bits would be as a number, 480.
    """
    shift = {E4M3: 1, E5M2: 0}[kind]
    kept = ir.Constant(VEC_I16, [{E4M3: 0xBF80, E5M2: 0xFF00}[kind]] * LANES)
    one_byte = ir.Constant(VEC_I16, [8] * LANES)

    def emit(builder: Any, source: Any, stride: Any, target: Any, count: Any) -> None:
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(source, builder.mul(stride, loop.index))
            line = builder.add(target, builder.shl(loop.index, ir.Constant(I64, 6)))
            seconds = load(builder, at, VEC_I16)
            firsts = builder.shl(seconds, one_byte)
            for half, upper in enumerate((firsts, seconds)):
                upper = builder.ashr(upper, ir.Constant(VEC_I16, [shift] * LANES))
                upper = builder.and_(upper, kept)
                store(builder, upper, offset_by(builder, line, 32 * half))

    return primitive(types.void, (types.int64,) * 4, emit)


# `_copy_e4m3(source, stride, target, count)`
_copy_e4m3, _copy_e5m2 = _copy_halves(E4M3), _copy_halves(E5M2)


@jit
def _copy_vectors(
    kind: int,
    b: int,
    depth_stride: int,
    vector_stride: int,
    vectors: int,
    pairs: int,
    spare: int,
) -> None:
    for n in range(vectors):
        source, target = b + n * vector_stride, spare + n * 64 * pairs
        if kind == E4M3:
            _copy_e4m3(source, depth_stride, target, pairs)
        else:
            _copy_e5m2(source, depth_stride, target, pairs)


@jit
def _tile_width(kind: int, rows: int, vectors: int) -> int:
    """Vectors of the next tiles, which share what is read, of `vectors` left."""
    if AVX512:
        widest = 2 if kind == FLOAT16 and rows >= 8 else 4
    else:
        widest = 4 if rows == 1 else (2 if rows < 4 else 1)
    if vectors >= widest:
        return widest
    return 2 if vectors >= 2 else 1


@jit
def _tile_height(kind: int, width: int, rows: int) -> int:
    """Rows of the next tile of `width` vectors, of `rows` left."""
    if AVX512:
        # float16 costs a conversion a load, which more rows share.
        if kind == FLOAT16 and width <= 2 and rows >= 8:
            return 8
    elif width == 1 and rows >= 6:
        return 6
    return 4 if rows >= 4 else (2 if rows >= 2 else 1)


@jit
def multiply(
    kind: int,
    a: int,
    lda: int,
    b: int,
    depth_stride: int,
    vector_stride: int,
    c: int,
    ldc: int,
    rows: int,
    vectors: int,
    depth: int,
    keep: int,
    spare: int,
) -> None:
    """Product `C[rows, 16 * vectors] += A[rows, depth] @ B` with float32 A and C.

    B, of dtype `kind`, has vector n of depth step k at
    `b + n * vector_stride + k * depth_stride`. bfloat16 and 8 bits come in pairs: k and
    k+1 of a lane side by side, `depth_stride` for both; of an odd depth the second
    element of the last pair is not used. Strides are bytes. `keep = 0` overwrites C.

    8 bits are copied to `spare` as float16, a few vectors at a time, which stay in the
    L1 cache: `32 * COPIED_VECTORS` bytes for each depth step of an even number.
    """
    is_copied, pairs = kind >= E4M3, (depth + 1) // 2
    tile_kind = FLOAT16 if is_copied else kind
    v = 0
    while v < vectors:
        width = _tile_width(tile_kind, rows, vectors - v)
        tile = b + v * vector_stride
        if is_copied:
            _copy_vectors(kind, tile, depth_stride, vector_stride, width, pairs, spare)
            tile = spare
        r = 0
        while r < rows:
            height = _tile_height(tile_kind, width, rows - r)
            _product_tile(
                tile_kind,
                height,
                width,
                a + r * lda,
                lda,
                tile,
                32 if is_copied else depth_stride,
                64 * pairs if is_copied else vector_stride,
                c + r * ldc + v * 64,
                ldc,
                depth,
                keep,
            )
            r += height
        v += width
