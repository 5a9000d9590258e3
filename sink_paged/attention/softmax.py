# SPDX-License-Identifier: Apache-2.0
"""Softmax of one row of logits: base-2 exponentials, masks and biases, as LLVM IR."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from sink_paged.attention.simd import (
    ADDRESS,
    F32,
    I32,
    I64,
    LANES,
    LOG2_E,
    ROW,
    VEC,
    VEC_I16,
    VEC_I32,
    call_llvm,
    columns,
    constant,
    fma,
    int_constant,
    lane_numbers,
    load,
    offset_by,
    primitive,
    splat,
    store,
)

# Coefficients of 2**r, |r| <= 1/2, highest first: to 2e-7, and to 1e-4, which is a
# twentieth of the rounding to bfloat16.
_EXACT = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
_COARSE = (5.500869e-02, 2.422106e-01, 6.932829e-01, 1.0)


def _exp2(builder: Any, x: Any, coefficients: tuple[float, ...] = _EXACT) -> Any:
    """2**x of x <= 0, relatively to the precision of the coefficients; 0 below -127."""
    # At -127 the exponent cancels that of 1.0, which leaves the bits of 0.
    x = _greater(builder, x, constant(-127.0))
    # Adding 1.5 * 2**23 leaves the nearest integer in the low bits of the mantissa.
    magic = constant(12582912.0)
    shifted = builder.fadd(x, magic)
    r = builder.fsub(x, builder.fsub(shifted, magic))
    y = constant(coefficients[0])
    for coefficient in coefficients[1:]:
        y = fma(builder, y, r, constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, VEC_I32), int_constant(23))
    return builder.bitcast(builder.add(builder.bitcast(y, VEC_I32), exponent), VEC)


def _greater(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _reduce(builder: Any, vector: Any, combine: Callable[..., Any]) -> Any:
    """Combine the lanes of a vector in a tree."""
    for half in (8, 4, 2, 1):
        lanes = [(lane + half) % LANES for lane in range(LANES)]
        mask = ir.Constant(VEC_I32, lanes)
        turned = builder.shuffle_vector(vector, vector, mask)
        vector = combine(builder, vector, turned)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _emit_mask(builder: Any, row: Any, column: Any, begin: Any, end: Any) -> None:
    address = builder.add(row, builder.shl(column, ir.Constant(I64, 2)))
    columns = lane_numbers(builder, column)
    begin = splat(builder, builder.trunc(begin, I32))
    end = splat(builder, builder.trunc(end, I32))
    inside = builder.and_(
        builder.icmp_signed(">=", columns, begin),
        builder.icmp_signed("<", columns, end),
    )
    x = builder.select(inside, load(builder, address, VEC), constant(-np.inf))
    store(builder, x, address)


# `mask(row, column, begin, end)`: of the 16 logits from `column`, set those outside
# `[begin, end)` to -inf.
mask = primitive(types.void, (ADDRESS,) + (types.int64,) * 3, _emit_mask)


def _emit_largest(builder: Any, row: Any, begin: Any, end: Any) -> Any:
    # Four maxima, each of which would wait for its last.
    largest = [cgutils.alloca_once_value(builder, constant(-np.inf)) for _ in range(4)]

    def update(address: Any, count: int) -> None:
        for n in range(count):
            x = load(builder, offset_by(builder, address, 64 * n), VEC)
            known = builder.load(largest[n])
            builder.store(_greater(builder, x, known), largest[n])

    size = builder.and_(builder.sub(end, begin), ir.Constant(I64, -4 * LANES))
    middle = builder.add(begin, size)
    with columns(builder, row, begin, middle, step=4 * LANES) as (_, address):
        update(address, 4)
    with columns(builder, row, middle, end) as (_, address):
        update(address, 1)
    first, *others = (builder.load(pointer) for pointer in largest)
    for other in others:
        first = _greater(builder, first, other)
    return _reduce(builder, first, _greater)


largest_of = primitive(types.float32, ROW, _emit_largest)


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
    zero = ir.Constant(F32, 0.0)
    capped = builder.fcmp_ordered(">", cap, zero)
    limit = splat(builder, builder.select(capped, cap, ir.Constant(F32, 1.0)))
    with columns(builder, row, begin, end) as (column, address):
        x = builder.fmul(load(builder, address, VEC), splat(builder, scale))
        tanh = _tanh(builder, builder.fdiv(x, limit))
        x = builder.select(capped, builder.fmul(tanh, limit), x)
        distance = builder.sitofp(lane_numbers(builder, column), VEC)
        distance = builder.fadd(distance, splat(builder, shift))
        x = fma(builder, splat(builder, slope), distance, x)
        store(builder, builder.fmul(x, constant(LOG2_E)), address)


def _tanh(builder: Any, x: Any) -> Any:
    magnitude = call_llvm(builder, "llvm.fabs.v16f32", VEC, x)
    decay = _exp2(builder, builder.fmul(magnitude, constant(-2.0 * LOG2_E)))
    one = constant(1.0)
    tanh = builder.fdiv(builder.fsub(one, decay), builder.fadd(one, decay))
    tanh = call_llvm(builder, "llvm.copysign.v16f32", VEC, tanh, x)
    # 1 - exp(-2x) cancels near 0; the Taylor series does not.
    square = builder.fmul(x, x)
    series = fma(builder, square, constant(2.0 / 15.0), constant(-1.0 / 3.0))
    series = fma(builder, series, builder.fmul(square, x), x)
    small = builder.fcmp_ordered("<", magnitude, constant(0.05))
    return builder.select(small, series, tanh)


# `general_logits(row, begin, end, scale, cap, slope, shift)`, in place: scaled, capped
# where cap > 0, `+ slope * (column + shift)`, in units of log 2.
general_logits = primitive(
    types.void, (*ROW, *(types.float32,) * 4), _emit_general_logits
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
    largest, factor = splat(builder, builder.fneg(largest)), splat(builder, factor)
    total = cgutils.alloca_once_value(builder, constant(0.0))
    with columns(builder, row, begin, end) as (column, address):
        x = fma(builder, load(builder, address, VEC), factor, largest)
        y = _exp2(builder, x, _EXACT if copy is None else _COARSE)
        if copy is None:
            store(builder, y, address)
        else:
            at = builder.add(copy, builder.shl(column, ir.Constant(I64, 1)))
            # Weights are not negative: ties away from zero cost two steps less.
            bits = builder.add(builder.bitcast(y, VEC_I32), int_constant(0x8000))
            high = builder.lshr(bits, int_constant(16))
            store(builder, builder.trunc(high, VEC_I16), at)
        builder.store(builder.fadd(builder.load(total), y), total)
    return _reduce(builder, builder.load(total), lambda b, x, y: b.fadd(x, y))


# `exponentials(row, begin, end, factor, largest)`, in place: 2**(factor * x - largest);
# returns their sum.
exponentials = primitive(
    types.float32, (*ROW, types.float32, types.float32), _emit_exponentials
)
# The same, written as bfloat16 to the address in the last argument.
exponentials_bf16 = primitive(
    types.float32, (*ROW, types.float32, types.float32, ADDRESS), _emit_exponentials
)


def _emit_exp2(builder: Any, x: Any) -> Any:
    return builder.extract_element(
        _exp2(builder, splat(builder, x)), ir.Constant(I32, 0)
    )


exp2 = primitive(types.float32, (types.float32,), _emit_exp2)
