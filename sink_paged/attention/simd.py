# SPDX-License-Identifier: Apache-2.0
"""Vector primitives for numba kernels, as LLVM IR on 16 float32 lanes.

Every argument is an address (int64, bytes) or a scalar: the kernels work on raw
memory. LLVM lowers the 16 lanes to one AVX-512 register, or to two or four smaller
ones where the CPU has no AVX-512.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
LOG2_E = 1.4426950408889634
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

_F32, _I64, _I32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_I16, _F16 = ir.IntType(16), ir.HalfType()
_VEC = ir.VectorType(_F32, LANES)
_VEC_I32 = ir.VectorType(_I32, LANES)
_VEC_I16 = ir.VectorType(_I16, LANES)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function) -> _Function:
    """Compile without Python objects; callable from kernels only.

    The result is cached on disk beside the source. numba notices a change of the file
    that holds the function, not of this one: after an edit here delete `__pycache__`.
    """
    return cast(_Function, numba.njit(cache=True, error_model="numpy")(function))


def _intrinsic(
    returns: Any, arguments: tuple[Any, ...], emit: Callable[..., Any]
) -> Callable[..., Any]:
    """Make `emit(builder, *llvm_values)` callable from jitted code."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = emit(builder, *args)
        return context.get_dummy_value() if result is None else result

    def typing(context: Any, *args: Any) -> Any:
        return returns(*arguments), generate

    # numba matches the arguments of a call with these parameters.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(f"a{n}", kind) for n in range(1 + len(arguments))]
    )
    return cast(Callable[..., Any], intrinsic(typing))


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(element))


def _load(builder: Any, address: Any, element: Any) -> Any:
    align = 4 if element in (_F32, _I32, _I64, _VEC, _VEC_I32) else 2
    return builder.load(_pointer(builder, address, element), align=align, typ=element)


def _store(builder: Any, value: Any, address: Any) -> None:
    align = 2 if value.type in (_I16, _VEC_I16) else 4
    builder.store(value, _pointer(builder, address, value.type), align=align)


def _const(value: float) -> Any:
    rounded = float(np.float32(value))
    return ir.Constant(_VEC, [ir.Constant(_F32, rounded)] * LANES)


def _int_const(value: int) -> Any:
    return ir.Constant(_VEC_I32, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(
        ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0)
    )
    mask = ir.Constant(_VEC_I32, [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def _call(builder: Any, name: str, returns: Any, *values: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(returns, [v.type for v in values]), name
    )
    return builder.call(function, values)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _VEC, x, y, z)


def _offset(builder: Any, address: Any, nbytes: int) -> Any:
    return builder.add(address, ir.Constant(_I64, nbytes)) if nbytes else address


# Scalars

_ADDRESS = types.int64


def _scalar_load(numba_type: Any, element: Any) -> Callable[..., Any]:
    return _intrinsic(
        numba_type,
        (_ADDRESS,),
        lambda builder, address: _load(builder, address, element),
    )


load_i32 = _scalar_load(types.int32, _I32)
load_i64 = _scalar_load(types.int64, _I64)
load_f32 = _scalar_load(types.float32, _F32)
load_f64 = _scalar_load(types.float64, ir.DoubleType())
load_i16 = _scalar_load(types.int16, _I16)


def _scalar_store(numba_type: Any) -> Callable[..., Any]:
    return _intrinsic(
        types.void,
        (_ADDRESS, numba_type),
        lambda builder, address, value: _store(builder, value, address),
    )


store_i32 = _scalar_store(types.int32)
store_i16 = _scalar_store(types.int16)
store_f32 = _scalar_store(types.float32)


def _emit_fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    pointer = _pointer(builder, address, _I64)
    return builder.atomic_rmw("add", pointer, amount, "monotonic")


fetch_add = _intrinsic(types.int64, (_ADDRESS, types.int64), _emit_fetch_add)


# Rows of 16-lane vectors


def _widen(builder: Any, kind: int, address: Any) -> Any:
    """Load 16 consecutive elements of a dtype as float32."""
    if kind == FLOAT32:
        return _load(builder, address, _VEC)
    bits = _load(builder, address, _VEC_I16)
    if kind == FLOAT16:
        half = builder.bitcast(bits, ir.VectorType(_F16, LANES))
        return builder.fpext(half, _VEC)
    shifted = builder.shl(builder.zext(bits, _VEC_I32), _int_const(16))
    return builder.bitcast(shifted, _VEC)


def _narrow(builder: Any, kind: int, value: Any) -> Any:
    """Round float32 lanes to a dtype, to nearest even."""
    if kind == FLOAT32:
        return value
    if kind == FLOAT16:
        half = builder.fptrunc(value, ir.VectorType(_F16, LANES))
        return builder.bitcast(half, _VEC_I16)
    bits = builder.bitcast(value, _VEC_I32)
    odd = builder.and_(builder.lshr(bits, _int_const(16)), _int_const(1))
    rounded = builder.add(bits, builder.add(odd, _int_const(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, _int_const(16)), _VEC_I16)


def _vector_load(kind: int) -> Callable[..., Any]:
    def emit(builder: Any, source: Any, target: Any) -> None:
        _store(builder, _widen(builder, kind, source), target)

    return _intrinsic(types.void, (_ADDRESS, _ADDRESS), emit)


def _vector_store(kind: int) -> Callable[..., Any]:
    def emit(builder: Any, source: Any, target: Any, factor: Any) -> None:
        value = builder.fmul(_load(builder, source, _VEC), _splat(builder, factor))
        _store(builder, _narrow(builder, kind, value), target)

    return _intrinsic(types.void, (_ADDRESS, _ADDRESS, types.float32), emit)


_widen_f32, _widen_bf16, _widen_f16 = (_vector_load(kind) for kind in range(3))
_narrow_f32, _narrow_bf16, _narrow_f16 = (_vector_store(kind) for kind in range(3))


@jit
def widen_row(kind: int, source: int, target: int, count: int) -> None:
    """Copy `count` (a multiple of 16) elements of a dtype to float32."""
    for n in range(0, count, 16):
        if kind == 0:
            _widen_f32(source + 4 * n, target + 4 * n)
        elif kind == 1:
            _widen_bf16(source + 2 * n, target + 4 * n)
        else:
            _widen_f16(source + 2 * n, target + 4 * n)


@jit
def narrow_row(kind: int, source: int, target: int, count: int, factor: float) -> None:
    """Write `count` float32 times `factor` as a dtype, rounded to nearest even."""
    for n in range(0, count, 16):
        if kind == 0:
            _narrow_f32(source + 4 * n, target + 4 * n, factor)
        elif kind == 1:
            _narrow_bf16(source + 4 * n, target + 2 * n, factor)
        else:
            _narrow_f16(source + 4 * n, target + 2 * n, factor)


# Softmax of one row of logits


def _exp2(builder: Any, x: Any) -> Any:
    """2**x of x <= 0 to 2e-7 relative; 0 below -126 (also of -inf)."""
    normal = builder.fcmp_ordered(">", x, _const(-126.0))
    x = builder.select(normal, x, _const(-126.0))
    # Adding 1.5 * 2**23 leaves the nearest integer in the low bits of the mantissa.
    magic = _const(12582912.0)
    shifted = builder.fadd(x, magic)
    r = builder.fsub(x, builder.fsub(shifted, magic))
    y = _const(1.535336188319500e-4)
    for coefficient in (
        1.339887440266574e-3,
        9.618437357674640e-3,
        5.550332471162809e-2,
        2.402264791363012e-1,
        6.931472028550421e-1,
        1.0,
    ):
        y = _fma(builder, y, r, _const(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _VEC_I32), _int_const(23))
    y = builder.bitcast(builder.add(builder.bitcast(y, _VEC_I32), exponent), _VEC)
    return builder.select(normal, y, _const(0.0))


def _greater(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _reduce(builder: Any, vector: Any, combine: Callable[..., Any]) -> Any:
    """Combine the lanes of a vector in a tree."""
    for half in (8, 4, 2, 1):
        lanes = [(lane + half) % LANES for lane in range(LANES)]
        mask = ir.Constant(_VEC_I32, lanes)
        turned = builder.shuffle_vector(vector, vector, mask)
        vector = combine(builder, vector, turned)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@contextmanager
def _columns(
    builder: Any, row: Any, begin: Any, end: Any, shift: int = 2
) -> Iterator[tuple[Any, Any]]:
    """Loop over `[begin, end)` in steps of 16, giving column and its address."""
    step = ir.Constant(_I64, LANES)
    with cgutils.for_range_slice(builder, begin, end, step) as (column, _):
        yield column, builder.add(row, builder.shl(column, ir.Constant(_I64, shift)))


def _lanes(builder: Any, first: Any) -> Any:
    """Column numbers `first .. first + 15` as <16 x i32>."""
    start = _splat(builder, builder.trunc(first, _I32))
    return builder.add(start, ir.Constant(_VEC_I32, list(range(LANES))))


def _emit_mask(builder: Any, row: Any, column: Any, begin: Any, end: Any) -> None:
    address = builder.add(row, builder.shl(column, ir.Constant(_I64, 2)))
    columns = _lanes(builder, column)
    begin = _splat(builder, builder.trunc(begin, _I32))
    end = _splat(builder, builder.trunc(end, _I32))
    inside = builder.and_(
        builder.icmp_signed(">=", columns, begin),
        builder.icmp_signed("<", columns, end),
    )
    x = builder.select(inside, _load(builder, address, _VEC), _const(-np.inf))
    _store(builder, x, address)


# `mask(row, column, begin, end)`: of the 16 logits from `column`, set those outside
# `[begin, end)` to -inf.
mask = _intrinsic(types.void, (_ADDRESS,) + (types.int64,) * 3, _emit_mask)


def _emit_largest(builder: Any, row: Any, begin: Any, end: Any) -> Any:
    largest = cgutils.alloca_once_value(builder, _const(-np.inf))
    with _columns(builder, row, begin, end) as (_, address):
        x = _load(builder, address, _VEC)
        builder.store(_greater(builder, x, builder.load(largest)), largest)
    return _reduce(builder, builder.load(largest), _greater)


_ROW = (_ADDRESS, types.int64, types.int64)
largest_of = _intrinsic(types.float32, _ROW, _emit_largest)


def _emit_general_logits(
    builder: Any,
    row: Any,
    begin: Any,
    end: Any,
    scale: Any,
    cap: Any,
    slope: Any,
    shift: Any,
) -> None:
    zero = ir.Constant(_F32, 0.0)
    capped = builder.fcmp_ordered(">", cap, zero)
    limit = _splat(builder, builder.select(capped, cap, ir.Constant(_F32, 1.0)))
    with _columns(builder, row, begin, end) as (column, address):
        x = builder.fmul(_load(builder, address, _VEC), _splat(builder, scale))
        tanh = _tanh(builder, builder.fdiv(x, limit))
        x = builder.select(capped, builder.fmul(tanh, limit), x)
        distance = builder.sitofp(_lanes(builder, column), _VEC)
        distance = builder.fadd(distance, _splat(builder, shift))
        x = _fma(builder, _splat(builder, slope), distance, x)
        _store(builder, builder.fmul(x, _const(LOG2_E)), address)


def _tanh(builder: Any, x: Any) -> Any:
    magnitude = _call(builder, "llvm.fabs.v16f32", _VEC, x)
    decay = _exp2(builder, builder.fmul(magnitude, _const(-2.0 * LOG2_E)))
    one = _const(1.0)
    tanh = builder.fdiv(builder.fsub(one, decay), builder.fadd(one, decay))
    tanh = _call(builder, "llvm.copysign.v16f32", _VEC, tanh, x)
    # 1 - exp(-2x) cancels near 0; the Taylor series does not.
    square = builder.fmul(x, x)
    series = _fma(builder, square, _const(2.0 / 15.0), _const(-1.0 / 3.0))
    series = _fma(builder, series, builder.fmul(square, x), x)
    small = builder.fcmp_ordered("<", magnitude, _const(0.05))
    return builder.select(small, series, tanh)


# `general_logits(row, begin, end, scale, cap, slope, shift)`, in place: scaled, capped
# where cap > 0, `+ slope * (column + shift)`, in units of log 2.
general_logits = _intrinsic(
    types.void, (*_ROW, *(types.float32,) * 4), _emit_general_logits
)


def _emit_exponentials(
    builder: Any,
    row: Any,
    begin: Any,
    end: Any,
    factor: Any,
    largest: Any,
    copy: Any = None,
) -> Any:
    largest, factor = _splat(builder, builder.fneg(largest)), _splat(builder, factor)
    total = cgutils.alloca_once_value(builder, _const(0.0))
    with _columns(builder, row, begin, end) as (column, address):
        x = _fma(builder, _load(builder, address, _VEC), factor, largest)
        y = _exp2(builder, x)
        _store(builder, y, address)
        if copy is not None:
            at = builder.add(copy, builder.shl(column, ir.Constant(_I64, 1)))
            # Weights are not negative: ties away from zero cost two steps less.
            bits = builder.add(builder.bitcast(y, _VEC_I32), _int_const(0x8000))
            high = builder.lshr(bits, _int_const(16))
            _store(builder, builder.trunc(high, _VEC_I16), at)
        builder.store(builder.fadd(builder.load(total), y), total)
    return _reduce(builder, builder.load(total), lambda b, x, y: b.fadd(x, y))


# `exponentials(row, begin, end, factor, largest)`, in place: 2**(factor * x - largest);
# returns their sum.
exponentials = _intrinsic(
    types.float32, (*_ROW, types.float32, types.float32), _emit_exponentials
)
# The last argument is the address of a second, bfloat16 copy of the row.
exponentials_twice = _intrinsic(
    types.float32, (*_ROW, types.float32, types.float32, _ADDRESS), _emit_exponentials
)


def _zero_row(vector: Any, shift: int) -> Callable[..., Any]:
    def emit(builder: Any, row: Any, begin: Any, end: Any) -> None:
        with _columns(builder, row, begin, end, shift) as (_, address):
            _store(builder, ir.Constant(vector, None), address)

    return _intrinsic(types.void, _ROW, emit)


zero_row = _zero_row(_VEC, 2)
zero_half_row = _zero_row(_VEC_I16, 1)


def _emit_scale_row(builder: Any, row: Any, count: Any, factor: Any) -> None:
    factor = _splat(builder, factor)
    with _columns(builder, row, ir.Constant(_I64, 0), count) as (_, address):
        _store(builder, builder.fmul(_load(builder, address, _VEC), factor), address)


scale_row = _intrinsic(
    types.void, (_ADDRESS, types.int64, types.float32), _emit_scale_row
)


def _emit_exp2(builder: Any, x: Any) -> Any:
    return builder.extract_element(
        _exp2(builder, _splat(builder, x)), ir.Constant(_I32, 0)
    )


exp2 = _intrinsic(types.float32, (types.float32,), _emit_exp2)


# Register-tiled matrix product


def _row_address(builder: Any, base: Any, stride: Any, row: int) -> Any:
    return builder.add(base, builder.mul(stride, ir.Constant(_I64, row)))


def _product(builder: Any, kind: int, rows: int, vectors: int, args: Any) -> None:
    """Emit the micro-kernel `C[rows, 16 * vectors] (+)= A[rows, depth] @ B`."""
    a, lda, b, depth_stride, vector_stride, c, ldc, depth, accumulate = args
    step = 2 if kind == BFLOAT16 else 1
    rows_a = [_row_address(builder, a, lda, r) for r in range(rows)]
    rows_c = [_row_address(builder, c, ldc, r) for r in range(rows)]
    column = [builder.mul(vector_stride, ir.Constant(_I64, n)) for n in range(vectors)]
    keep = builder.icmp_signed("!=", accumulate, ir.Constant(_I64, 0))
    initial = [
        builder.select(
            keep, _load(builder, _offset(builder, rows_c[r], 64 * n), _VEC), _const(0)
        )
        for r in range(rows)
        for n in range(vectors)
    ]

    def add(sums: list[Any], address: Any, offset: Any, both: bool) -> list[Any]:
        tiles: list[tuple[Any, ...]] = []
        for n in range(vectors):
            at = builder.add(address, column[n])
            if kind != BFLOAT16:
                tiles.append((_widen(builder, kind, at),))
                continue
            pair = _load(builder, at, _VEC_I32)
            low = builder.shl(pair, _int_const(16))
            high = builder.and_(pair, _int_const(-65536))
            tiles.append((builder.bitcast(low, _VEC), builder.bitcast(high, _VEC)))
        sums = list(sums)
        for r in range(rows):
            for half in range(2 if kind == BFLOAT16 and both else 1):
                at = _offset(builder, builder.add(rows_a[r], offset), 4 * half)
                value = _splat(builder, _load(builder, at, _F32))
                for n in range(vectors):
                    i = r * vectors + n
                    sums[i] = _fma(builder, value, tiles[n][half], sums[i])
        return sums

    entry = builder.block
    head = builder.append_basic_block("product.head")
    body = builder.append_basic_block("product.body")
    done = builder.append_basic_block("product.done")
    whole = builder.and_(depth, ir.Constant(_I64, -step))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    address = builder.phi(_I64)
    sums = [builder.phi(_VEC) for _ in initial]
    index.add_incoming(ir.Constant(_I64, 0), entry)
    address.add_incoming(b, entry)
    for phi, value in zip(sums, initial, strict=True):
        phi.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", index, whole), body, done)
    builder.position_at_end(body)
    offset = builder.shl(index, ir.Constant(_I64, 2))
    updated = add(sums, address, offset, True)
    index.add_incoming(builder.add(index, ir.Constant(_I64, step)), body)
    address.add_incoming(builder.add(address, depth_stride), body)
    for phi, value in zip(sums, updated, strict=True):
        phi.add_incoming(value, body)
    builder.branch(head)
    builder.position_at_end(done)

    def write(values: list[Any]) -> None:
        for r in range(rows):
            for n in range(vectors):
                at = _offset(builder, rows_c[r], 64 * n)
                _store(builder, values[r * vectors + n], at)

    if step == 1:
        write(sums)
        return
    offset = builder.shl(index, ir.Constant(_I64, 2))
    with builder.if_else(builder.icmp_signed("<", index, depth)) as (odd, even):
        with odd:
            write(add(sums, address, offset, False))
        with even:
            write(sums)


def _emit_variants(
    builder: Any,
    case: Any,
    variants: Mapping[int, Callable[..., None]],
    name: str,
    args: tuple[Any, ...],
) -> None:
    """Call `variants[case]`, each emitted as a function of its own, with `args`."""
    done = builder.append_basic_block("variants.end")
    switch = builder.switch(case, done)
    signature = ir.FunctionType(ir.VoidType(), [_I64] * len(args))
    for key, emit in variants.items():
        function = ir.Function(builder.module, signature, f"{name}.{key}")
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block("entry"))
        emit(inside, args=function.args)
        inside.ret_void()
        block = builder.append_basic_block("variant")
        switch.add_case(ir.Constant(_I64, key), block)
        builder.position_at_end(block)
        builder.call(function, args)
        builder.branch(done)
    builder.position_at_end(done)


def _emit_product(builder: Any, kind: Any, rows: Any, vectors: Any, *args: Any) -> None:
    tiles = builder.add(builder.mul(rows, ir.Constant(_I64, 10)), vectors)
    case = builder.add(builder.mul(kind, ir.Constant(_I64, 100)), tiles)
    keys = [
        *itertools.product(range(3), (4, 2, 1), (4, 2, 1)),
        *itertools.product((FLOAT16,), (8,), (2, 1)),
    ]
    variants = {
        100 * kind + 10 * rows + vectors: functools.partial(
            _product, kind=kind, rows=rows, vectors=vectors
        )
        for kind, rows, vectors in keys
    }
    _emit_variants(builder, case, variants, "sink_paged.product", args)


_product_tile = _intrinsic(types.void, (types.int64,) * 12, _emit_product)


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
) -> None:
    """Product `C[rows, 16 * vectors] += A[rows, depth] @ B` with float32 A and C.

    B, of dtype `kind`, has vector n of depth step k at
    `b + n * vector_stride + k * depth_stride`. bfloat16 comes in pairs: k and k+1 of a
    lane side by side, `depth_stride` for both; of an odd depth the second element of
    the last pair is not used. Strides are bytes. `keep = 0` overwrites C.
    """
    # float16 costs a conversion a load, which more rows share.
    tall = kind == FLOAT16 and rows >= 8
    v = 0
    while v < vectors:
        width = 4 if v + 4 <= vectors and not tall else (2 if v + 2 <= vectors else 1)
        r = 0
        while r < rows:
            height = 4 if r + 4 <= rows else (2 if r + 2 <= rows else 1)
            if tall and r + 8 <= rows:
                height = 8
            _product_tile(
                kind,
                height,
                width,
                a + r * lda,
                lda,
                b + v * vector_stride,
                depth_stride,
                vector_stride,
                c + r * ldc + v * 64,
                ldc,
                depth,
                keep,
            )
            r += height
        v += width


# Matrix tiles (AMX): 16 rows of 64 bytes, bfloat16 pairs in, float32 out


def _has_amx() -> bool:
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-bf16"))


HAS_AMX = _has_amx()
PREFETCH_BYTES = 4096


def _tile_call(builder: Any, name: str, *values: Any) -> None:
    if HAS_AMX:
        _call(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def _bytes_pointer(builder: Any, address: Any) -> Any:
    return _pointer(builder, address, ir.IntType(8))


configure_tiles = _intrinsic(
    types.void,
    (_ADDRESS,),
    lambda builder, config: _tile_call(
        builder, "ldtilecfg", _bytes_pointer(builder, config)
    ),
)


@jit
def begin_tiles(config: int, rows: int) -> None:
    """Configure this thread's tiles, of `rows` <= 16 rows for A and C, 16 for B.

    64 bytes at `config` are scratch.
    """
    for n in range(16):
        store_i32(config + 4 * n, 0)
    store_i32(config, 1)  # palette
    for n in range(4):
        store_i32(config + 16 + 4 * n, 64 + (64 << 16))  # bytes a row
    store_i32(config + 48, rows * 0x01010101)
    store_i32(config + 52, rows * 0x0101 + 0x10100000)
    configure_tiles(config)


end_tiles = _intrinsic(
    types.void, (), lambda builder: _tile_call(builder, "tilerelease")
)


def _tile(number: int) -> Any:
    return ir.Constant(ir.IntType(8), number)


def _prefetch_tiles(
    builder: Any, address: Any, vectors: int, vector_stride: Any
) -> None:
    """Few query rows read the cache once: memory is the limit, and is asked early."""
    flags = [ir.Constant(_I32, n) for n in (0, 3, 1)]
    for v in range(vectors):
        strip = builder.mul(vector_stride, ir.Constant(_I64, v))
        for line in range(16):
            ahead = ir.Constant(_I64, PREFETCH_BYTES + 64 * line)
            at = builder.add(builder.add(address, strip), ahead)
            pointer = _bytes_pointer(builder, at)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)


def _tile_product(builder: Any, rows: int, vectors: int, args: Any) -> None:
    """Emit `C[16 * rows, 16 * vectors] (+)= A[., 32 * depth] @ B`; tiles 0-3 are C."""
    a, lda, b, row_stride, vector_stride, depth_stride, c, ldc, depth, accumulate = args
    tiles = [(r, v, 2 * r + v) for r in range(rows) for v in range(vectors)]

    def at(base: Any, count: int, stride: Any) -> Any:
        address = builder.add(base, builder.mul(stride, ir.Constant(_I64, count)))
        return _bytes_pointer(builder, address)

    def corner(r: int, v: int) -> Any:
        return at(_offset(builder, c, 64 * v), 16 * r, ldc)

    keep = builder.icmp_signed("!=", accumulate, ir.Constant(_I64, 0))
    with builder.if_else(keep) as (load, clear):
        with load:
            for r, v, number in tiles:
                _tile_call(builder, "tileloadd64", _tile(number), corner(r, v), ldc)
        with clear:
            for _, _, number in tiles:
                _tile_call(builder, "tilezero", _tile(number))
    with cgutils.for_range(builder, depth) as loop:
        step_a = builder.add(a, builder.mul(loop.index, ir.Constant(_I64, 64)))
        step_b = builder.add(b, builder.mul(loop.index, depth_stride))
        if rows == 1:
            _prefetch_tiles(builder, step_b, vectors, vector_stride)
        for v in range(vectors):
            source = at(step_b, v, vector_stride)
            _tile_call(builder, "tileloadd64", _tile(6 + v), source, row_stride)
        for r in range(rows):
            _tile_call(
                builder, "tileloadd64", _tile(4 + r), at(step_a, 16 * r, lda), lda
            )
            for v in range(vectors):
                number = _tile(2 * r + v)
                _tile_call(builder, "tdpbf16ps", number, _tile(4 + r), _tile(6 + v))
    for r, v, number in tiles:
        _tile_call(builder, "tilestored64", _tile(number), corner(r, v), ldc)


def _emit_tile_product(builder: Any, rows: Any, vectors: Any, *args: Any) -> None:
    variants = list(itertools.product((1, 2), (1, 2)))
    case = builder.add(builder.mul(rows, ir.Constant(_I64, 10)), vectors)
    _emit_variants(
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


_tile_block = _intrinsic(types.void, (types.int64,) * 12, _emit_tile_product)


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
) -> None:
    """Product `C[16 * rows, 16 * vectors] (+)= A[16 * rows, 32 * depth] @ B` on tiles.

    A and B are bfloat16, C float32. Tile (k, n) of B has its 16 rows of 16 pairs at
    `b + k * depth_stride + n * vector_stride`, `row_stride` apart. Strides are bytes.
    `keep = 0` overwrites C. Only between `begin_tiles` and `end_tiles`.
    """
    v = 0
    while v < vectors:
        width = 2 if v + 2 <= vectors else 1
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
            )
            r += height
        v += width
