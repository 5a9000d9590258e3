# SPDX-License-Identifier: Apache-2.0
"""Rotations for any text position, and the second rotation of a query.

A key is rotated once, at its text position. A query is rotated at its text position
``i`` for the window, and once more by ``min(i, C) - i`` for the sinks, which puts the
sinks at their distance inside the cache (StreamingLLM, section 3.2).

vLLM's cos/sin table ends at the trained length. Past it the rotation is composed in
float64 from small tables: a position is written in base ``RADIX`` and its rotation is
the product of the rotations of its digits. Below the trained length the rows of vLLM's
own table are used, bit for bit.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from sink_paged.config import MAX_STREAM_TOKENS

RADIX_BITS = 11
RADIX = 1 << RADIX_BITS


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


def read_geometry(rotary: nn.Module) -> RotaryGeometry:
    """Read the geometry of one of vLLM's rotary modules, and prove it.

    The frequencies come from the module's own formula in its own precision; a formula
    that does not reproduce the module's cos/sin table is not believed.

    Raises:
        UnsupportedLayerError: when no formula of the module explains its table.
    """
    table = getattr(rotary, "cos_sin_cache", None)
    if not isinstance(rotary, RotaryEmbeddingBase) or not isinstance(table, Tensor):
        raise UnsupportedLayerError(
            f"its rotary module {type(rotary).__name__} has no cos/sin table to read"
        )
    table = table.detach().to("cpu", torch.float64)
    # Exact where the module names it; the table may be rounded to bfloat16.
    amplitude = float(getattr(rotary, "mscale", table[0, 0]))
    with torch.device("cpu"):
        for frequencies in _candidate_frequencies(rotary):
            if _explains(table, frequencies, amplitude):
                return RotaryGeometry(
                    frequencies, amplitude, interleaved=not rotary.is_neox_style
                )
    raise UnsupportedLayerError(
        f"the frequencies of its rotary module {type(rotary).__name__} could not be "
        "read: they do not reproduce its cos/sin table"
    )


def _candidate_frequencies(rotary: RotaryEmbeddingBase) -> list[Tensor]:
    scaling = getattr(rotary, "scaling_factor", None)
    factors = getattr(rotary, "scaling_factors", [scaling] if scaling else [])
    candidates = []
    for argument in (rotary.base, *factors):
        frequencies = rotary._compute_inv_freq(argument).to(torch.float64)
        candidates += [frequencies, *(frequencies / factor for factor in factors)]
    return candidates


def _explains(table: Tensor, frequencies: Tensor, amplitude: float) -> bool:
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


class StepRotations:
    """The rotations of one step's tokens for one rotary module of the model.

    Owns a copy of the module, which takes its place in the model. Before each forward
    pass row ``t`` of the copy's cos/sin table is set for token ``t`` of the batch, and
    rows are looked up by the token's index in the batch. The model's code, compiled
    or not, stays as it is. (A copy: vLLM shares one module among all engines of a
    process.)

    Attributes:
        geometry: how the module rotates.
        rotary: the copy.
        sink_rotation: float32 ``[max_tokens, rotary_dim]``, cos half and sin half of
            each query's second rotation.
    """

    def __init__(
        self, rotary: RotaryEmbeddingBase, capacity: int, max_tokens: int
    ) -> None:
        """Copy ``rotary`` and replace the copy's table and look-up.

        Args:
            rotary: a rotary module of the loaded model.
            capacity: ``C = S + R``.
            max_tokens: the most tokens of a step, padding included.
        """
        self.geometry = read_geometry(rotary)
        self.capacity = capacity
        self.trained = rotary.cos_sin_cache
        self.tables = RotationTables(self.geometry.frequencies, self.trained.device)
        shape = (max_tokens, self.geometry.rotary_dim)
        device = self.trained.device
        self.rotary = copy.deepcopy(rotary)
        self.rotary.cos_sin_cache = self.trained.new_zeros(shape)
        self.sink_rotation = torch.zeros(shape, dtype=torch.float32, device=device)
        look_up = self.rotary._forward_method
        batch_rows = torch.arange(max_tokens, device=device)

        def rotate(positions: Tensor, *args: Any, **kwargs: Any) -> Any:
            return look_up(batch_rows[: positions.shape[0]], *args, **kwargs)

        self.rotary._forward_method = rotate

    def set_positions(self, positions: Tensor) -> None:
        """Set the rows for a step's tokens.

        Args:
            positions: text positions, int64 ``[num_tokens]``.
        """
        num_tokens = positions.shape[0]
        last = self.trained.shape[0] - 1
        far = self.tables(positions) * self.geometry.amplitude
        rows = torch.where(
            (positions <= last)[:, None],
            self.trained.index_select(0, positions.clamp(max=last)),
            torch.cat((far.real, far.imag), dim=-1).to(self.trained.dtype),
        )
        # Looked up each time: vLLM replaces the table when it casts it.
        self.rotary.cos_sin_cache[:num_tokens].copy_(rows)
        back = self.tables((positions - self.capacity).clamp(min=0))
        self.sink_rotation[:num_tokens].copy_(
            torch.cat((back.real, -back.imag), dim=-1)
        )
