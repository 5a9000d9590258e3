# SPDX-License-Identifier: Apache-2.0
"""Vector primitives for numba kernels, as LLVM IR on 16 float32 lanes.

Every argument is an address (int64, bytes) or a scalar: the kernels work on raw
memory. LLVM lowers the 16 lanes to one AVX-512 register, or to two or four smaller
ones where the CPU has no AVX-512.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
LOG2_E = 1.4426950408889634
FLOAT32, BFLOAT16, FLOAT16, E4M3, E5M2 = range(5)

F32, I64, I32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
F64 = ir.DoubleType()
I16, I8, _F16 = ir.IntType(16), ir.IntType(8), ir.HalfType()
VEC = ir.VectorType(F32, LANES)
VEC_I32 = ir.VectorType(I32, LANES)
VEC_I16 = ir.VectorType(I16, LANES)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function) -> _Function:
    """Compile without Python objects; callable from kernels only.

    Not cached by itself: `launch` caches whole kernels.
    """
    return cast(_Function, numba.njit(error_model="numpy")(function))


def primitive(
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


def pointer_to(builder: Any, address: Any, element: Any) -> Any:
    """Turn an address into a pointer to a value of an LLVM type."""
    return builder.inttoptr(address, ir.PointerType(element))


def load(builder: Any, address: Any, element: Any) -> Any:
    """Load a value of an LLVM type from an address, aligned to its elements."""
    align = 4 if element in (F32, I32, I64, VEC, VEC_I32) else 2
    return builder.load(pointer_to(builder, address, element), align=align, typ=element)


def store(builder: Any, value: Any, address: Any) -> None:
    """Store a value at an address, aligned to its elements."""
    align = {I8: 1, I16: 2, VEC_I16: 2}.get(value.type, 4)
    builder.store(value, pointer_to(builder, address, value.type), align=align)


def constant(value: float) -> Any:
    """16 equal float32 lanes."""
    rounded = float(np.float32(value))
    return ir.Constant(VEC, [ir.Constant(F32, rounded)] * LANES)


def int_constant(value: int) -> Any:
    """16 equal int32 lanes."""
    return ir.Constant(VEC_I32, [value] * LANES)


def splat(builder: Any, scalar: Any) -> Any:
    """Copy a scalar to 16 lanes."""
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(
        ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0)
    )
    mask = ir.Constant(VEC_I32, [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def call_llvm(builder: Any, name: str, returns: Any, *values: Any) -> Any:
    """Call an LLVM intrinsic by its full name."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(returns, [v.type for v in values]), name
    )
    return builder.call(function, values)


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z` of float32 lanes."""
    return call_llvm(builder, "llvm.fma.v16f32", VEC, x, y, z)


def offset_by(builder: Any, address: Any, nbytes: int) -> Any:
    """Add a constant number of bytes to an address."""
    return builder.add(address, ir.Constant(I64, nbytes)) if nbytes else address


def emit_variants(
    builder: Any,
    case: Any,
    variants: Mapping[int, Callable[..., None]],
    name: str,
    args: tuple[Any, ...],
) -> None:
    """Call `variants[case]`, each emitted as a function of its own, with `args`."""
    done = builder.append_basic_block("variants.end")
    switch = builder.switch(case, done)
    signature = ir.FunctionType(ir.VoidType(), [I64] * len(args))
    for key, emit in variants.items():
        function = ir.Function(builder.module, signature, f"{name}.{key}")
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block("entry"))
        emit(inside, args=function.args)
        inside.ret_void()
        block = builder.append_basic_block("variant")
        switch.add_case(ir.Constant(I64, key), block)
        builder.position_at_end(block)
        builder.call(function, args)
        builder.branch(done)
    builder.position_at_end(done)


# Scalars

ADDRESS = types.int64


def _scalar_load(numba_type: Any, element: Any) -> Callable[..., Any]:
    return primitive(
        numba_type,
        (ADDRESS,),
        lambda builder, address: load(builder, address, element),
    )


load_i32 = _scalar_load(types.int32, I32)
load_i64 = _scalar_load(types.int64, I64)
load_f32 = _scalar_load(types.float32, F32)
load_f64 = _scalar_load(types.float64, F64)
load_i16 = _scalar_load(types.int16, I16)


def _scalar_store(numba_type: Any) -> Callable[..., Any]:
    return primitive(
        types.void,
        (ADDRESS, numba_type),
        lambda builder, address, value: store(builder, value, address),
    )


store_i32 = _scalar_store(types.int32)
store_i16 = _scalar_store(types.int16)
store_i64 = _scalar_store(types.int64)
store_f32 = _scalar_store(types.float32)


def _emit_fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    pointer = pointer_to(builder, address, I64)
    return builder.atomic_rmw("add", pointer, amount, "acq_rel")


fetch_add = primitive(types.int64, (ADDRESS, types.int64), _emit_fetch_add)


# Elements by kind


@jit
def element_size(kind: int) -> int:
    """Bytes of an element."""
    if kind == FLOAT32:
        return types.int64(4)
    return types.int64(1 if kind >= E4M3 else 2)


@jit
def pair_size(kind: int) -> int:
    """Elements of one lane that lie side by side in a page, see `cpu`."""
    return types.int64(2 if kind == BFLOAT16 or kind >= E4M3 else 1)


# Rows of 16-lane vectors


@contextmanager
def columns(
    builder: Any, row: Any, begin: Any, end: Any, shift: int = 2, step: int = LANES
) -> Iterator[tuple[Any, Any]]:
    """Loop over `[begin, end)` in steps of 16, giving column and its address."""
    stride = ir.Constant(I64, step)
    with cgutils.for_range_slice(builder, begin, end, stride) as (column, _):
        yield column, builder.add(row, builder.shl(column, ir.Constant(I64, shift)))


def lane_numbers(builder: Any, first: Any) -> Any:
    """Column numbers `first .. first + 15` as <16 x i32>."""
    start = splat(builder, builder.trunc(first, I32))
    return builder.add(start, ir.Constant(VEC_I32, list(range(LANES))))


def extend_f16(builder: Any, bits: Any) -> Any:
    """The bits of 16 float16 as float32."""
    return builder.fpext(builder.bitcast(bits, ir.VectorType(_F16, LANES)), VEC)


def widen(builder: Any, kind: int, address: Any) -> Any:
    """Load 16 consecutive elements of a dtype as float32."""
    if kind == FLOAT32:
        return load(builder, address, VEC)
    bits = load(builder, address, VEC_I16)
    if kind == FLOAT16:
        return extend_f16(builder, bits)
    shifted = builder.shl(builder.zext(bits, VEC_I32), int_constant(16))
    return builder.bitcast(shifted, VEC)


def narrow(builder: Any, kind: int, value: Any) -> Any:
    """Round float32 lanes to a dtype, to nearest even."""
    if kind == FLOAT32:
        return value
    if kind == FLOAT16:
        half = builder.fptrunc(value, ir.VectorType(_F16, LANES))
        return builder.bitcast(half, VEC_I16)
    bits = builder.bitcast(value, VEC_I32)
    odd = builder.and_(builder.lshr(bits, int_constant(16)), int_constant(1))
    rounded = builder.add(bits, builder.add(odd, int_constant(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, int_constant(16)), VEC_I16)


def _vector_load(kind: int) -> Callable[..., Any]:
    def emit(builder: Any, source: Any, target: Any) -> None:
        store(builder, widen(builder, kind, source), target)

    return primitive(types.void, (ADDRESS, ADDRESS), emit)


def _vector_store(kind: int) -> Callable[..., Any]:
    def emit(builder: Any, source: Any, target: Any, factor: Any) -> None:
        value = builder.fmul(load(builder, source, VEC), splat(builder, factor))
        store(builder, narrow(builder, kind, value), target)

    return primitive(types.void, (ADDRESS, ADDRESS, types.float32), emit)


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


ROW = (ADDRESS, types.int64, types.int64)


def _zero_row(vector: Any, shift: int) -> Callable[..., Any]:
    def emit(builder: Any, row: Any, begin: Any, end: Any) -> None:
        with columns(builder, row, begin, end, shift) as (_, address):
            store(builder, ir.Constant(vector, None), address)

    return primitive(types.void, ROW, emit)


zero_row = _zero_row(VEC, 2)
zero_half_row = _zero_row(VEC_I16, 1)


def _emit_scale_row(builder: Any, row: Any, count: Any, factor: Any) -> None:
    factor = splat(builder, factor)
    with columns(builder, row, ir.Constant(I64, 0), count) as (_, address):
        store(builder, builder.fmul(load(builder, address, VEC), factor), address)


scale_row = primitive(
    types.void, (ADDRESS, types.int64, types.float32), _emit_scale_row
)


def _emit_add_scaled(
    builder: Any, row: Any, count: Any, factor: Any, other: Any
) -> None:
    factor, shift = splat(builder, factor), builder.sub(other, row)
    with columns(builder, row, ir.Constant(I64, 0), count) as (_, address):
        y = load(builder, builder.add(address, shift), VEC)
        store(builder, fma(builder, y, factor, load(builder, address, VEC)), address)


# `add_scaled_row(row, count, factor, other)`: `row += factor * other`.
add_scaled_row = primitive(
    types.void, (ADDRESS, types.int64, types.float32, ADDRESS), _emit_add_scaled
)


def _emit_copy_masked(builder: Any, source: Any, target: Any, mask: Any) -> None:
    line = builder.and_(load(builder, source, VEC_I32), splat(builder, mask))
    store(builder, line, target)


# `copy_masked(source, target, mask)`: 64 bytes, of each int32 the bits of the mask.
copy_masked = primitive(types.void, (ADDRESS, ADDRESS, types.int32), _emit_copy_masked)


def _emit_rotate(
    builder: Any, source: Any, target: Any, angles: Any, distance: Any
) -> None:
    def pair(base: Any) -> tuple[Any, Any]:
        return load(builder, base, VEC), load(builder, builder.add(base, distance), VEC)

    (x, y), (cos, sin) = pair(source), pair(angles)
    minus_y = builder.fneg(y)
    rotated = fma(builder, x, cos, builder.fmul(minus_y, sin))
    store(builder, rotated, target)
    rotated = fma(builder, y, cos, builder.fmul(x, sin))
    store(builder, rotated, builder.add(target, distance))


# `rotate_lanes(source, target, angles, distance)`: rotate 16 pairs whose second half,
# as that of the angles, lies `distance` bytes behind the first.
rotate_lanes = primitive(types.void, (ADDRESS,) * 4, _emit_rotate)


def emit_prefetch(builder: Any, address: Any) -> None:
    """Ask early for the cache line at an address."""
    pointer = pointer_to(builder, address, ir.IntType(8))
    flags = [ir.Constant(I32, n) for n in (0, 3, 1)]  # read, keep in L1, data
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)


prefetch = primitive(types.void, (ADDRESS,), emit_prefetch)
