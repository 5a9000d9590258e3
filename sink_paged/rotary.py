# SPDX-License-Identifier: Apache-2.0
"""Rotations for any text position, and the second rotation of a query.

A key is rotated once, at its text position. A query is rotated at its text position
``i`` for the window, and once more by ``min(i, C) - i`` for the sinks, which puts the
sinks at their distance inside the cache (StreamingLLM, section 3.2).

A model's rotary module serves positions up to the trained length. Past it the rotation
is composed in float64 from small tables: a position is written in base ``RADIX`` and
its rotation is the product of the rotations of its digits. Below the trained length the
module's own cos and sin are used, bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.token_loops import RADIX, RADIX_BITS, rotate_tokens


class UnsupportedLayerError(ValueError):
    """A layer whose positions the extension cannot get right."""


@dataclass(frozen=True)
class RotaryGeometry:
    """How a rotary module rotates.

    Attributes:
        frequencies: angle per position, float64 ``[rotary_dim / 2]``.
        amplitude: factor on cos and sin (YaRN's attention factor), else 1.
        interleaved: rotates pairs ``(2k, 2k+1)`` (GPT-J) instead of halves (NeoX).
    """

    frequencies: Tensor
    amplitude: float
    interleaved: bool

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate."""
        return 2 * self.frequencies.numel()


def rotate(
    rows: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Rotate the first ``2 * len(cos)`` dims of each row by the given angles.

    Args:
        rows: ``[..., head_size]``.
        cos: ``[rotary_dim // 2]``, cosine of each pair's angle.
        sin: ``[rotary_dim // 2]``, sine of each pair's angle.
        interleaved: Pairs are ``(2k, 2k + 1)`` (GPT-J) instead of
            ``(k, k + rotary_dim // 2)`` (neox).

    Returns:
        A rotated copy, ``[..., head_size]``.
    """
    half = cos.shape[-1]
    rotated = rows.clone()
    if interleaved:
        first, second = rows[..., 0 : 2 * half : 2], rows[..., 1 : 2 * half : 2]
        rotated[..., 0 : 2 * half : 2] = first * cos - second * sin
        rotated[..., 1 : 2 * half : 2] = second * cos + first * sin
    else:
        first, second = rows[..., :half], rows[..., half : 2 * half]
        rotated[..., :half] = first * cos - second * sin
        rotated[..., half : 2 * half] = second * cos + first * sin
    return rotated


def explains(table: Tensor, frequencies: Tensor, amplitude: float) -> bool:
    """Whether ``amplitude * (cos | sin)(position * frequencies)`` is ``table``."""
    length, rotary_dim = table.shape
    if 2 * frequencies.numel() != rotary_dim or not math.isfinite(amplitude):
        return False
    positions = torch.unique(
        torch.tensor([0, 1, 2, 3, 7, length // 7, length // 3, length - 1])
    )
    positions = positions[positions < length]
    angles = positions[:, None].double() * frequencies
    expected = amplitude * torch.cat((angles.cos(), angles.sin()), dim=-1)
    # The table was made in float32 (angle error: position * 2^-24) and may be stored in
    # bfloat16 (2^-8 of the value).
    tolerance = amplitude * (2**-8 + positions[:, None].double() * 2**-22)
    return bool(((table[positions] - expected).abs() <= tolerance).all())


class RotationTables:
    """``exp(1j * position * frequency)`` for positions up to the stream limit.

    Attributes:
        digits: complex128 tables ``[RADIX or fewer, rotary_dim / 2]``, lowest first.
        digits_as_real: the same memory, float64 ``[..., 2]``.
    """

    def __init__(self, frequencies: Tensor, device: torch.device) -> None:
        """Build the tables, about 5 MB for a head of 128."""
        self.digits: list[Tensor] = []
        step = 1
        while step <= MAX_STREAM_TOKENS:
            count = min(RADIX, MAX_STREAM_TOKENS // step + 1)
            positions = torch.arange(count, dtype=torch.float64) * step
            angles = positions[:, None] * frequencies
            self.digits.append(torch.polar(torch.ones_like(angles), angles).to(device))
            step *= RADIX
        self.digits_as_real = [torch.view_as_real(digit) for digit in self.digits]

    def __call__(self, positions: Tensor) -> Tensor:
        """Rotations of ``positions`` (int64 ``[num_tokens]``, not negative).

        Returns:
            complex128 ``[num_tokens, rotary_dim / 2]``.
        """
        mask = RADIX - 1
        rotation = self.digits[0].index_select(0, positions & mask)
        for level, digit in enumerate(self.digits[1:], start=1):
            index = (positions >> (RADIX_BITS * level)) & mask
            rotation = rotation * digit.index_select(0, index)
        return rotation


class StepRotations(ABC):
    """The rotations of one step's tokens for one rotary module of the model.

    Before each forward pass row ``t`` of a small table is set for token ``t`` of the
    batch, and ``rotary``, which takes the module's place in the model, looks rows up by
    the token's index in the batch. The model's code, compiled or not, stays as it is.

    Attributes:
        geometry: how the module rotates.
        style_is_open: the module does not say which dims form a pair.
        rotary: what takes the module's place.
        trained_length: positions below it rotate as the module does, bit for bit.
        trained: the module's cos half and sin half of those positions,
            ``[trained_length, rotary_dim]``.
        sink_rotation: float32 ``[max_tokens, rotary_dim]``, cos half and sin half of
            each query's second rotation.
    """

    rotary: Any
    trained: Tensor
    style_is_open = False

    def __init__(
        self,
        geometry: RotaryGeometry,
        trained_length: int,
        query_limit: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """Build the tables.

        Args:
            geometry: how the module rotates.
            trained_length: positions that the module serves.
            query_limit: where queries stay for the sinks, ``C = S + R``.
            max_tokens: the most tokens of a step, padding included.
            device: of the model.
        """
        self.geometry = geometry
        self.trained_length = trained_length
        self.query_limit = query_limit
        self.tables = RotationTables(geometry.frequencies, device)
        shape = (max_tokens, geometry.rotary_dim)
        self.sink_rotation = torch.zeros(shape, dtype=torch.float32, device=device)
        if device.type == "cpu":
            self._far_rows = torch.zeros_like(self.sink_rotation)
            arrays = *self.tables.digits, self._far_rows, self.sink_rotation
            self._arrays = [array.numpy() for array in arrays]

    def set_positions(self, positions: Tensor) -> None:
        """Set the rows for a step's tokens.

        Args:
            positions: text positions, int64 ``[num_tokens]``.
        """
        if positions.is_cuda:
            self.launch(positions)
            return
        num_tokens = positions.shape[0]
        num_far = rotate_tokens(
            positions.numpy(),
            self.trained_length,
            self.query_limit,
            self.geometry.amplitude,
            *self._arrays,
        )
        if num_far == 0:
            rows = self.trained_rows(positions)
        else:
            rows = self._far_rows[:num_tokens]
        if 0 < num_far < num_tokens:
            last = self.trained_length - 1
            near = self.trained_rows(positions.clamp(max=last))
            is_near = (positions <= last)[:, None]
            rows = torch.where(is_near, near, rows.to(near.dtype))
        self.set_rows(rows)

    def launch(self, positions: Tensor) -> None:
        """As ``set_positions``, by one Triton kernel, which a CUDA graph may hold."""
        from sink_paged.rotation_kernel import rotate_rows

        rotate_rows(
            positions,
            self.trained,
            self.tables,
            self.geometry.amplitude,
            self.query_limit,
            *self.row_columns(),
            self.sink_rotation,
        )

    @abstractmethod
    def row_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rows stand that ``rotary`` returns or rotates by.

        Returns:
            cos and sin, ``[max_tokens, width]`` each, with the same strides; and the
            pair of dims that each column serves, int32 ``[width]``.
        """

    @abstractmethod
    def trained_rows(self, positions: Tensor) -> Tensor:
        """The module's own cos and sin at ``positions``, all below trained_length.

        Returns:
            ``[num_tokens, rotary_dim]``, cos half and sin half.
        """

    @abstractmethod
    def set_rows(self, rows: Tensor) -> None:
        """Let ``rotary`` return ``rows`` for the batch's tokens, in their order."""
