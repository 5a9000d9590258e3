# SPDX-License-Identifier: Apache-2.0
"""Both rotations of a step's tokens in one launch.

The eager code of :mod:`sink_paged.rotary` is some forty small kernels for each rotary
module, which on a GPU cost more than the attention of a short step. This is the same
product of digit rotations, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sink_paged.rotary import RotationTables
from sink_paged.token_loops import RADIX, RADIX_BITS


def rotate_rows(
    positions: Tensor,
    trained: Tensor,
    tables: RotationTables,
    amplitude: float,
    query_limit: int,
    cos: Tensor,
    sin: Tensor,
    pairs: Tensor,
    sink_rotation: Tensor,
) -> None:
    """Set the rows of a step's tokens; launches one kernel and reads nothing back.

    Args:
        positions: text positions, int64 ``[num_tokens]``.
        trained: cos half and sin half of positions below the trained length,
            ``[trained_length, 2 * num_pairs]``; their rows get these as they are.
        tables: rotations of the digits of any position.
        amplitude: factor on cos and sin beyond the trained length.
        query_limit: where queries stay for the sinks, ``C = S + R``.
        cos: cosines of each token's rotation, ``[max_tokens, width]``; written.
        sin: likewise its sines, with the strides of ``cos``.
        pairs: the pair of dims that each column serves, int32 ``[width]``.
        sink_rotation: float32 ``[max_tokens, 2 * num_pairs]``, cos half and sin half
            of the rotation by ``min(i, C) - i``; written.
    """
    num_pairs = sink_rotation.shape[1] // 2
    digits = tables.digits_as_real
    assert len(digits) == 3, "what the kernel multiplies"
    width = cos.shape[1]
    _rotate_rows[(positions.shape[0],)](
        positions,
        trained,
        trained.shape[0],
        trained.stride(0),
        *digits,
        query_limit,
        cos,
        sin,
        cos.stride(0),
        pairs,
        sink_rotation,
        sink_rotation.stride(0),
        amplitude=amplitude,
        RADIX_BITS=RADIX_BITS,
        RADIX=RADIX,
        num_pairs=num_pairs,
        width=width,
        BLOCK=triton.next_power_of_2(max(width, num_pairs)),
        num_warps=1 if width <= 128 else 2,
    )


@triton.jit
def _rotation(  # type: ignore[no-untyped-def]
    position,
    pair,
    mask,
    low,
    middle,
    high,
    RADIX_BITS: tl.constexpr,  # noqa: N803
    RADIX: tl.constexpr,  # noqa: N803
    num_pairs: tl.constexpr,
):
    """Cos and sin, float64, of a position's angles: its digits' rotations, multiplied.

    A table of digits is ``[rows, num_pairs, 2]``.
    """
    at = low + ((position & (RADIX - 1)) * num_pairs + pair) * 2
    cos = tl.load(at, mask=mask, other=1.0)
    sin = tl.load(at + 1, mask=mask, other=0.0)
    digit = (position >> RADIX_BITS) & (RADIX - 1)
    at = middle + (digit * num_pairs + pair) * 2
    cos2 = tl.load(at, mask=mask, other=1.0)
    sin2 = tl.load(at + 1, mask=mask, other=0.0)
    cos, sin = cos * cos2 - sin * sin2, cos * sin2 + sin * cos2
    digit = position >> (2 * RADIX_BITS)
    at = high + (digit * num_pairs + pair) * 2
    cos2 = tl.load(at, mask=mask, other=1.0)
    sin2 = tl.load(at + 1, mask=mask, other=0.0)
    return cos * cos2 - sin * sin2, cos * sin2 + sin * cos2


@triton.jit
def _rotate_rows(  # type: ignore[no-untyped-def]
    positions,
    trained,
    trained_length,
    trained_stride,
    low,
    middle,
    high,
    query_limit,
    cos_rows,
    sin_rows,
    rows_stride,
    pairs,
    sink_rows,
    sink_stride,
    amplitude: tl.constexpr,  # a float argument would be float32
    RADIX_BITS: tl.constexpr,  # noqa: N803
    RADIX: tl.constexpr,  # noqa: N803
    num_pairs: tl.constexpr,
    width: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0)
    # Behind a step's tokens vLLM's buffer holds what an earlier step left there.
    position = tl.maximum(tl.load(positions + token), 0)
    column = tl.arange(0, BLOCK)

    mask = column < width
    pair = tl.load(pairs + column, mask=mask, other=0)
    if position < trained_length:
        row = trained + position * trained_stride
        cos = tl.load(row + pair, mask=mask).to(tl.float64)
        sin = tl.load(row + num_pairs + pair, mask=mask).to(tl.float64)
    else:
        cos, sin = _rotation(
            position, pair, mask, low, middle, high, RADIX_BITS, RADIX, num_pairs
        )
        cos *= amplitude
        sin *= amplitude
    dtype = cos_rows.dtype.element_ty
    at = token * rows_stride + column
    tl.store(cos_rows + at, cos.to(tl.float32).to(dtype), mask=mask)
    tl.store(sin_rows + at, sin.to(tl.float32).to(dtype), mask=mask)

    mask = column < num_pairs
    back = tl.maximum(position - query_limit, 0)
    cos, sin = _rotation(
        back, column, mask, low, middle, high, RADIX_BITS, RADIX, num_pairs
    )
    at = sink_rows + token * sink_stride + column
    tl.store(at, cos.to(tl.float32), mask=mask)
    tl.store(at + num_pairs, (-sin).to(tl.float32), mask=mask)
