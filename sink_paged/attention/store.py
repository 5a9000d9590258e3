# SPDX-License-Identifier: Apache-2.0
"""The kernel that stores keys and values in their pages; the layout is `cpu`'s."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    CACHE,
    CACHE_BLOCK,
    CACHE_HEAD,
    CACHE_KIND,
    HEAD_SIZE,
    ITEM,
    KEY,
    KEY_HEAD,
    KEY_SCALE,
    KEY_TOKEN,
    KIND,
    KV_HEADS,
    NUM_TOKENS,
    SHARE,
    SLOTS,
    VALUE,
    VALUE_HEAD,
    VALUE_SCALE,
    VALUE_TOKEN,
)
from sink_paged.attention.simd import (
    ADDRESS,
    E4M3,
    E5M2,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VEC,
    VEC_I16,
    VEC_I32,
    call_llvm,
    constant,
    element_size,
    emit_variants,
    fetch_add,
    int_constant,
    jit,
    load,
    load_i16,
    load_i32,
    load_i64,
    offset_by,
    pointer_to,
    primitive,
    splat,
    store_i16,
    store_i32,
    widen,
    widen_row,
)
from sink_paged.attention.simd import store as write_lanes


def _emit_copy_half(builder: Any, source: Any, target: Any) -> None:
    write_lanes(builder, load(builder, source, VEC_I16), target)


# `_copy_half(source, target)`: 32 bytes.
_copy_half = primitive(types.void, (ADDRESS, ADDRESS), _emit_copy_half)


def _store_interleaved(second: bool) -> Callable[..., Any]:
    """Store 16 values of 16 bits as the first or the second of 16 pairs.

    The others stay untouched: another thread may be writing them.
    """
    pairs = ir.VectorType(I16, 2 * LANES)
    ours = ir.Constant(
        ir.VectorType(ir.IntType(1), 2 * LANES), [not second, second] * LANES
    )

    def emit(builder: Any, source: Any, target: Any) -> None:
        lanes = builder.zext(load(builder, source, VEC_I16), VEC_I32)
        if second:
            lanes = builder.shl(lanes, int_constant(16))
        pointer = pointer_to(builder, target, pairs)
        align = ir.Constant(I32, 2)
        values = builder.bitcast(lanes, pairs)
        name = "llvm.masked.store.v32i16.p0"
        call_llvm(builder, name, ir.VoidType(), values, pointer, align, ours)

    return primitive(types.void, (ADDRESS, ADDRESS), emit)


_store_first = _store_interleaved(second=False)
_store_second = _store_interleaved(second=True)


# Bits of the mantissa, bias of the exponent, largest number.
_FORMATS = {E4M3: (3, 7, 448.0), E5M2: (2, 15, 57344.0)}


def _round_to_8_bits(builder: Any, kind: int, value: Any) -> Any:
    """Round float32 lanes to nearest even, and to the largest number at most."""
    mantissa, bias, largest = _FORMATS[kind]
    bits = builder.bitcast(value, VEC_I32)
    sign = builder.and_(builder.lshr(bits, int_constant(24)), int_constant(0x80))
    bits = builder.and_(bits, int_constant(0x7FFFFFFF))
    x = builder.bitcast(bits, VEC)
    is_nan = builder.fcmp_unordered("uno", x, x)
    x = builder.select(
        builder.fcmp_ordered("<", x, constant(largest)), x, constant(largest)
    )
    bits = builder.bitcast(x, VEC_I32)
    dropped = 23 - mantissa
    odd = builder.and_(builder.lshr(bits, int_constant(dropped)), int_constant(1))
    half = int_constant((1 << (dropped - 1)) - 1 + ((bias - 127) << 23))
    normal = builder.add(builder.add(bits, odd), half)
    normal = builder.lshr(normal, int_constant(dropped))
    # Added to a power of two whose last bit is that of the subnormal numbers.
    power = constant(2.0 ** (24 - bias - mantissa))
    subnormal = builder.bitcast(builder.fadd(x, power), VEC_I32)
    subnormal = builder.sub(subnormal, builder.bitcast(power, VEC_I32))
    is_subnormal = builder.fcmp_ordered("<", x, constant(2.0 ** (1 - bias)))
    code = builder.select(is_subnormal, subnormal, normal)
    code = builder.select(is_nan, int_constant(0x7F), code)
    return builder.trunc(builder.or_(code, sign), ir.VectorType(I8, LANES))


def _quantise_row(
    builder: Any, kind: int, cache_kind: int, part: Any, args: Any
) -> None:
    """Emit the rounding of a row, 16 elements of dtype `kind` after the other."""
    source, target, vector_stride, count, scale = args
    scale = builder.fptrunc(load(builder, scale, F64), F32)
    with cgutils.for_range(builder, count) as loop:
        shift = ir.Constant(I64, 6 if kind == 0 else 5)
        lanes = widen(
            builder, kind, builder.add(source, builder.shl(loop.index, shift))
        )
        lanes = builder.fdiv(lanes, splat(builder, scale))
        codes = _round_to_8_bits(builder, cache_kind, lanes)
        number = LANES * I8.width // part.width
        codes = builder.bitcast(codes, ir.VectorType(part, number))
        at = builder.add(target, builder.mul(vector_stride, loop.index))
        for n in range(number):
            code = builder.extract_element(codes, ir.Constant(I32, n))
            stride = 2 * LANES if part is I16 else 2
            write_lanes(builder, code, offset_by(builder, at, stride * n))


def _quantise(name: str, part: Any) -> Callable[..., Any]:
    def emit(builder: Any, case: Any, *args: Any) -> None:
        variants = {
            10 * kind + cache_kind: functools.partial(
                _quantise_row, kind=kind, cache_kind=cache_kind, part=part
            )
            for kind, cache_kind in itertools.product(range(3), _FORMATS)
        }
        emit_variants(builder, case, variants, f"sink_paged.quantise_{name}", args)

    return primitive(types.void, (types.int64,) * 6, emit)


# `_quantise_key(10 * kind + cache kind, source, target, vector_stride, count, scale)`:
# write `count` vectors of 16 elements, divided by the float64 at `scale`, as the pairs
# of a lane; and those of a value as the firsts or the seconds of pairs.
_quantise_key, _quantise_value = _quantise("key", I16), _quantise("value", I8)


@jit
def _store_key(kind: int, source: int, tile: int, lane: int, head_size: int) -> None:
    if kind == 0:
        for d in range(head_size):
            store_i32(tile + 64 * d + 4 * lane, load_i32(source + 4 * d))
    elif kind == 1:
        for d in range(head_size // 2):
            store_i32(tile + 64 * d + 4 * lane, load_i32(source + 4 * d))
    else:
        for d in range(head_size):
            store_i16(tile + 32 * d + 2 * lane, load_i16(source + 2 * d))


@jit
def _store_value(
    kind: int, source: int, values: int, offset: int, head_size: int, strip: int
) -> None:
    for n in range(head_size // 16):
        line = values + n * strip
        if kind == 0:
            widen_row(0, source + 64 * n, line + 64 * offset, 16)
        elif kind == 2:
            _copy_half(source + 32 * n, line + 32 * offset)
        elif offset % 2 == 0:
            _store_first(source + 32 * n, line + 32 * offset)
        else:
            _store_second(source + 32 * n, line + 32 * (offset - 1))


@jit
def _store_token(args: int, token: int) -> None:
    num_kv_heads, kind = load_i64(args + KV_HEADS), load_i64(args + KIND)
    head_size, block_size = load_i64(args + HEAD_SIZE), load_i64(args + BLOCK_SIZE)
    cache_kind = load_i64(args + CACHE_KIND)
    element, cache_element = element_size(kind), element_size(cache_kind)
    slot = load_i64(load_i64(args + SLOTS) + 8 * token)
    if slot < 0:
        return
    block, offset = slot // block_size, slot % block_size
    key = load_i64(args + KEY) + token * load_i64(args + KEY_TOKEN) * element
    value = load_i64(args + VALUE) + token * load_i64(args + VALUE_TOKEN) * element
    page = load_i64(args + CACHE) + block * load_i64(args + CACHE_BLOCK)
    strip = 16 * block_size * cache_element
    for _ in range(num_kv_heads):
        tile = page + (offset // 16) * 16 * head_size * cache_element
        values = page + block_size * head_size * cache_element
        if cache_kind == kind:
            _store_key(kind, key, tile, offset % 16, head_size)
            _store_value(kind, value, values, offset, head_size, strip)
        else:
            case, vectors = 10 * kind + cache_kind, head_size // 16
            tile += 2 * (offset % 16)
            _quantise_key(case, key, tile, 256, vectors, args + KEY_SCALE)
            values += 32 * (offset // 2) + offset % 2
            _quantise_value(case, value, values, strip, vectors, args + VALUE_SCALE)
        key += load_i64(args + KEY_HEAD) * element
        value += load_i64(args + VALUE_HEAD) * element
        page += load_i64(args + CACHE_HEAD)


@jit
def store(args: int) -> None:
    """Body of one thread: store runs of tokens until none is left.

    Runs, because neighbours share cache lines, which two threads had better not write.
    """
    num_tokens, share = load_i64(args + NUM_TOKENS), load_i64(args + SHARE)
    begin = share * fetch_add(args + ITEM, 1)
    while begin < num_tokens:
        for token in range(begin, min(begin + share, num_tokens)):
            _store_token(args, token)
        begin = share * fetch_add(args + ITEM, 1)
