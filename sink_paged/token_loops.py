# SPDX-License-Identifier: Apache-2.0
"""Loops over a step's tokens on the CPU, compiled by numba.

Each takes the place of a dozen small tensor operations, whose calls are all that a
decode pays for: it has few tokens, and many layers wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

RADIX_BITS = 11
RADIX = 1 << RADIX_BITS
"""A position is written in this base: three digits up to the stream limit."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(signature: str) -> Callable[[_Function], _Function]:
    """Compile for one signature, or load from numba's cache where it can write one."""

    def decorate(function: _Function) -> _Function:
        try:
            return cast(_Function, numba.njit(signature, cache=True)(function))
        except (RuntimeError, OSError):  # numba can write to no directory
            return cast(_Function, numba.njit(signature)(function))

    return decorate


@compiled("i8(i8[::1], i8, i8, f8" + 3 * ", c16[:,::1]" + 2 * ", f4[:,::1]" + ")")
def rotate_tokens(
    positions: npt.NDArray[np.int64],
    trained_length: int,
    query_limit: int,
    amplitude: float,
    low: npt.NDArray[np.complex128],
    middle: npt.NDArray[np.complex128],
    high: npt.NDArray[np.complex128],
    rows: npt.NDArray[np.float32],
    sink_rotation: npt.NDArray[np.float32],
) -> int:
    """Both rotations of each token, where the model's own table does not have it.

    Args:
        positions: text positions, ``[num_tokens]``.
        trained_length: positions below it are left to the model's table.
        query_limit: where queries stay for the sinks, ``C = S + R``.
        amplitude: factor on cos and sin of ``rows``.
        low: rotations of a position's lowest digit, ``[RADIX, rotary_dim / 2]``.
        middle: of the next digit.
        high: of the highest one.
        rows: ``[max_tokens, rotary_dim]``, cos half and sin half; written for tokens
            from ``trained_length`` on.
        sink_rotation: ``[max_tokens, rotary_dim]``, the rotation by
            ``min(position, query_limit) - position``; written for every token.

    Returns:
        Tokens from ``trained_length`` on.
    """
    num_pairs, num_far = low.shape[1], 0
    for token in range(positions.shape[0]):
        position = positions[token]
        if position >= trained_length:
            num_far += 1
            first = low[position & (RADIX - 1)]
            second = middle[(position >> RADIX_BITS) & (RADIX - 1)]
            third = high[position >> (2 * RADIX_BITS)]
            for pair in range(num_pairs):
                turn = amplitude * (first[pair] * second[pair] * third[pair])
                rows[token, pair] = turn.real
                rows[token, num_pairs + pair] = turn.imag
        back = max(position - query_limit, 0)
        first = low[back & (RADIX - 1)]
        second = middle[(back >> RADIX_BITS) & (RADIX - 1)]
        third = high[back >> (2 * RADIX_BITS)]
        for pair in range(num_pairs):
            turn = first[pair] * second[pair] * third[pair]
            sink_rotation[token, pair] = turn.real
            sink_rotation[token, num_pairs + pair] = -turn.imag
    return num_far


@compiled("void(i8[::1], i8, i8, i8, i8[::1])")
def ring_positions(
    positions: npt.NDArray[np.int64],
    block_size: int,
    pinned: int,
    ring: int,
    out: npt.NDArray[np.int64],
) -> None:
    """Positions whose block is the ring column of the text's block.

    Args:
        positions: text positions, ``[num_tokens]``.
        block_size: tokens a block.
        pinned: columns of pinned blocks.
        ring: columns behind them.
        out: ``[num_tokens]`` or longer, written.
    """
    for token in range(positions.shape[0]):
        block, offset = divmod(positions[token], block_size)
        if block >= pinned:
            block = pinned + (block - pinned) % ring
        out[token] = block * block_size + offset
