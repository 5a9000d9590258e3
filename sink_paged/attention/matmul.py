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
    FLOAT32,
    I64,
    LANES,
    VEC,
    VEC_I16,
    VEC_I32,
    constant,
    emit_prefetch,
    emit_variants,
    extend_f16,
    fma,
    int_constant,
    jit,
    load,
    offset_by,
    pair_size,
    primitive,
    splat,
    store,
    widen,
)

# 16 lanes are one of 32 registers with AVX-512, else two of 16, which hold 6 sums of 16
# lanes, what they are multiplied with, and nothing else.
AVX512 = bool(llvm.get_host_cpu_features().get("avx512f"))
PAIRED = (BFLOAT16, E4M3, E5M2)
FEW_ROWS = 16  # which wait for memory, and read it front to back
# Tiles: (kind, rows, vectors of 16 lanes).
_WIDE = [(k, r, v) for k in range(3) for r in (4, 2, 1) for v in (4, 2, 1)]
_WIDE += [(FLOAT16, 8, 2), (FLOAT16, 8, 1)]
_NARROW = [(k, r, 1) for k in range(3) for r in (6, 4, 2, 1)]
TILES = _WIDE if AVX512 else _NARROW
TILES += [(k, r, 1) for k in (E4M3, E5M2) for r in (4, 2, 1)]
CHAINS = 8 if AVX512 else 4  # of sums, since one would wait for itself
AHEAD = 4096  # bytes that are asked for early
COPIED_VECTORS = 4  # of 8 bits that are copied as float16 at once
E4M3_FACTOR = 256.0  # of E4M3 read as float16, see `_split_fp8`


def _row_address(builder: Any, base: Any, stride: Any, row: int) -> Any:
    return builder.add(base, builder.mul(stride, ir.Constant(I64, row)))


def _split_bf16(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """The firsts and the seconds of 16 pairs of bfloat16, as float32."""
    firsts = builder.shl(pairs, int_constant(16))
    seconds = builder.and_(pairs, int_constant(-65536))
    return builder.bitcast(firsts, VEC), builder.bitcast(seconds, VEC)


def _split_fp8(builder: Any, kind: int, pairs: Any) -> tuple[Any, Any]:
    """The firsts and the seconds of 16 pairs of 8 bits, as the bits of float16.

    8 bits are the upper bits of a float16: those of E5M2 its first 8, those of E4M3 all
    but the first of the exponent, which makes them `E4M3_FACTOR` too small, subnormal
    ones too; its NaN becomes what its bits would be as a number, 480.
    """
    shift = ir.Constant(VEC_I16, [{E4M3: 1, E5M2: 0}[kind]] * LANES)
    kept = ir.Constant(VEC_I16, [{E4M3: 0xBF80, E5M2: 0xFF00}[kind]] * LANES)
    firsts = builder.shl(pairs, ir.Constant(VEC_I16, [8] * LANES))
    firsts = builder.and_(builder.ashr(firsts, shift), kept)
    return firsts, builder.and_(builder.ashr(pairs, shift), kept)


def _product(builder: Any, kind: int, rows: int, vectors: int, args: Any) -> None:
    """Emit the micro-kernel `C[rows, 16 * vectors] (+)= A[rows, depth] @ B`.

    Vector n asks early for what lies `ahead + n * ahead_stride` behind the tile.
    """
    a, lda, b, depth_stride, vector_stride, c, ldc, depth, accumulate, *rest = args
    first_ahead, ahead_stride = rest
    step = 2 if kind in PAIRED else 1
    step_bytes = 64 if kind in (FLOAT32, BFLOAT16) else 32
    unrolled = max(1, CHAINS // (rows * vectors))
    rows_a = [_row_address(builder, a, lda, r) for r in range(rows)]
    rows_c = [_row_address(builder, c, ldc, r) for r in range(rows)]
    column = [builder.mul(vector_stride, ir.Constant(I64, n)) for n in range(vectors)]
    ahead = [
        _row_address(builder, first_ahead, ahead_stride, n) for n in range(vectors)
    ]
    keep = builder.icmp_signed("!=", accumulate, ir.Constant(I64, 0))
    initial = [
        builder.select(
            keep, load(builder, offset_by(builder, rows_c[r], 64 * n), VEC), constant(0)
        )
        for r in range(rows)
        for n in range(vectors)
    ]

    def add(
        sums: list[Any], address: Any, offset: Any, both: bool = True, n: int = 0
    ) -> list[Any]:
        """Add the depth step (or pair) at `address`, the n-th of those unrolled."""
        tiles: list[tuple[Any, ...]] = []
        for v in range(vectors):
            if step_bytes == 64 or n % 2 == 0:  # two steps of 32 bytes share a line
                emit_prefetch(builder, builder.add(address, ahead[v]))
            at = builder.add(address, column[v])
            if kind == BFLOAT16:
                tiles.append(_split_bf16(builder, load(builder, at, VEC_I32)))
            elif kind in PAIRED:
                halves = _split_fp8(builder, kind, load(builder, at, VEC_I16))
                tiles.append(tuple(extend_f16(builder, half) for half in halves))
            else:
                tiles.append((widen(builder, kind, at),))
        sums = list(sums)
        for r in range(rows):
            for half in range(2 if kind in PAIRED and both else 1):
                at = offset_by(builder, builder.add(rows_a[r], offset), 4 * half)
                value = splat(builder, load(builder, at, F32))
                for v in range(vectors):
                    i = r * vectors + v
                    sums[i] = fma(builder, value, tiles[v][half], sums[i])
        return sums

    def loop(begin: Any, end: Any, address: Any, chains: list[list[Any]]) -> Any:
        """Add the steps of `[begin, end)`, in turns to the chains; where it ends."""
        entry = builder.block
        head = builder.append_basic_block("product.head")
        body = builder.append_basic_block("product.body")
        done = builder.append_basic_block("product.done")
        builder.branch(head)
        builder.position_at_end(head)
        index, at = builder.phi(I64), builder.phi(I64)
        index.add_incoming(begin, entry)
        at.add_incoming(address, entry)
        phis = [[builder.phi(VEC) for _ in chain] for chain in chains]
        for chain, values in zip(phis, chains, strict=True):
            for phi, value in zip(chain, values, strict=True):
                phi.add_incoming(value, entry)
        builder.cbranch(builder.icmp_signed("<", index, end), body, done)
        builder.position_at_end(body)
        offset, following = builder.shl(index, ir.Constant(I64, 2)), at
        for n, chain in enumerate(phis):
            updated = add(chain, following, offset, n=n)
            for phi, value in zip(chain, updated, strict=True):
                phi.add_incoming(value, body)
            following = builder.add(following, depth_stride)
            offset = offset_by(builder, offset, 4 * step)
        stride = ir.Constant(I64, step * len(chains))
        index.add_incoming(builder.add(index, stride), body)
        at.add_incoming(following, body)
        builder.branch(head)
        builder.position_at_end(done)
        return index, at, phis

    index, address, chains = ir.Constant(I64, 0), b, [initial]
    if unrolled > 1:
        zeros = [constant(0)] * len(initial)
        whole = builder.and_(depth, ir.Constant(I64, -step * unrolled))
        chains += [zeros] * (unrolled - 1)
        index, address, chains = loop(index, whole, address, chains)
    sums = chains[0]
    for chain in chains[1:]:
        sums = [builder.fadd(x, y) for x, y in zip(sums, chain, strict=True)]
    whole = builder.and_(depth, ir.Constant(I64, -step))
    index, address, (sums,) = loop(index, whole, address, [sums])

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
            write(add(sums, address, offset, both=False))
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


_product_tile = primitive(types.void, (types.int64,) * 14, _emit_product)


def _copy_halves(kind: int) -> Callable[..., Any]:
    """Copy 16 pairs of 8 bits, `count` times, as 16 float16 firsts and 16 seconds."""

    def emit(
        builder: Any, source: Any, stride: Any, target: Any, count: Any, ahead: Any
    ) -> None:
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(source, builder.mul(stride, loop.index))
            line = builder.add(target, builder.shl(loop.index, ir.Constant(I64, 6)))
            emit_prefetch(builder, builder.add(at, ahead))
            halves = _split_fp8(builder, kind, load(builder, at, VEC_I16))
            for n, half in enumerate(halves):
                store(builder, half, offset_by(builder, line, 32 * n))

    return primitive(types.void, (types.int64,) * 5, emit)


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
    ahead: int,
    ahead_stride: int,
) -> None:
    for n in range(vectors):
        source, target = b + n * vector_stride, spare + n * 64 * pairs
        following = ahead + n * (ahead_stride - vector_stride)
        if kind == E4M3:
            _copy_e4m3(source, depth_stride, target, pairs, following)
        else:
            _copy_e5m2(source, depth_stride, target, pairs, following)


@jit
def _tile_width(kind: int, rows: int, vectors: int) -> int:
    """Vectors of the next tiles, which share what is read, of `vectors` left."""
    if rows <= FEW_ROWS:
        return types.int64(1)
    widest = (2 if kind == FLOAT16 else 4) if AVX512 else 1
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
    elif width == 1 and rows >= 6 and kind <= FLOAT16:
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
    next_b: int,
    next_stride: int,
) -> None:
    """Product `C[rows, 16 * vectors] += A[rows, depth] @ B` with float32 A and C.

    B, of dtype `kind`, has vector n of depth step k at
    `b + n * vector_stride + k * depth_stride`. bfloat16 and 8 bits come in pairs: k and
    k+1 of a lane side by side, `depth_stride` for both; of an odd depth the second
    element of the last pair is not used. Strides are bytes. `keep = 0` overwrites C.

    For more than `FEW_ROWS` 8 bits are copied to `spare` as float16, a few vectors at a
    time, which stay in the L1 cache: `32 * COPIED_VECTORS` bytes for each depth
    step of an even number.

    What is read next is asked for early: behind the last vectors of this product, those
    at `next_b`, `next_stride` apart.
    """
    is_copied, pairs = kind >= E4M3 and rows > FEW_ROWS, (depth + 1) // 2
    tile_kind = FLOAT16 if is_copied else kind
    depth_steps = pairs if pair_size(kind) == 2 else depth
    early = types.int64(1)
    while early < vectors and early * depth_steps * depth_stride < AHEAD:
        early += 1
    tile_step, tile_stride = depth_stride, vector_stride
    if is_copied:
        tile_step, tile_stride = types.int64(32), 64 * pairs
    v = 0
    while v < vectors:
        width = _tile_width(tile_kind, rows, vectors - v)
        tile = b + v * vector_stride
        following = v + max(width, early)
        ahead, ahead_stride = (following - v) * vector_stride, vector_stride
        if following >= vectors:
            following -= vectors
            ahead, ahead_stride = next_b + following * next_stride - tile, next_stride
        if is_copied:
            _copy_vectors(
                kind,
                tile,
                depth_stride,
                vector_stride,
                width,
                pairs,
                spare,
                ahead,
                ahead_stride,
            )
            tile = spare
        r = 0
        while r < rows:
            if r > 0 or is_copied:  # nothing more to ask for
                ahead, ahead_stride = types.int64(0), tile_stride
            height = _tile_height(tile_kind, width, rows - r)
            _product_tile(
                tile_kind,
                height,
                width,
                a + r * lda,
                lda,
                tile,
                tile_step,
                tile_stride,
                c + r * ldc + v * 64,
                ldc,
                depth,
                keep,
                ahead,
                ahead_stride,
            )
            r += height
        v += width
