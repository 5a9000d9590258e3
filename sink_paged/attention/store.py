# SPDX-License-Identifier: Apache-2.0
"""The kernel that stores keys and values in their pages; the layout is `kernel`'s."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from sink_paged.attention.arguments import (
    BLOCK_SIZE,
    CACHE,
    CACHE_BLOCK,
    CACHE_HEAD,
    HEAD_SIZE,
    ITEM,
    KEY,
    KEY_HEAD,
    KEY_TOKEN,
    KIND,
    KV_HEADS,
    NUM_TOKENS,
    SHARE,
    SLOTS,
    VALUE,
    VALUE_HEAD,
    VALUE_TOKEN,
)
from sink_paged.attention.simd import (
    ADDRESS,
    I16,
    I32,
    LANES,
    VEC_I16,
    VEC_I32,
    call_llvm,
    fetch_add,
    int_constant,
    jit,
    load,
    load_i16,
    load_i32,
    load_i64,
    pointer_to,
    primitive,
    store_i16,
    store_i32,
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
    element = 2 if kind != 0 else 4
    slot = load_i64(load_i64(args + SLOTS) + 8 * token)
    if slot < 0:
        return
    block, offset = slot // block_size, slot % block_size
    key = load_i64(args + KEY) + token * load_i64(args + KEY_TOKEN) * element
    value = load_i64(args + VALUE) + token * load_i64(args + VALUE_TOKEN) * element
    page = load_i64(args + CACHE) + block * load_i64(args + CACHE_BLOCK)
    strip = 16 * block_size * element
    for _ in range(num_kv_heads):
        tile = page + (offset // 16) * 16 * head_size * element
        _store_key(kind, key, tile, offset % 16, head_size)
        values = page + block_size * head_size * element
        _store_value(kind, value, values, offset, head_size, strip)
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
