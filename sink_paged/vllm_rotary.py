# SPDX-License-Identifier: Apache-2.0
"""vLLM's own rotary modules: their geometry, and rotations for any position.

Such a module rotates by a table of cos and sin that ends at the trained length. A copy
of it with a table of the step's rows takes its place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import (
    Phi3LongRoPEScaledRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from sink_paged.rotary import (
    RotaryGeometry,
    StepRotations,
    UnsupportedLayerError,
    explains,
)


@dataclass(frozen=True)
class TableSource:
    """Where a rotary module of vLLM keeps its cos and sin.

    Attributes:
        name: attribute of the table ``[positions, rotary_dim]``, cos half and sin half.
        length: rows of it that serve the positions from 0 on.
        amplitude: factor on cos and sin, where the module names it.
        interleaved: rotates pairs ``(2k, 2k+1)`` instead of halves.
        look_up: name of the method that rotates by rows of the table.
    """

    name: str
    length: int
    amplitude: float | None
    interleaved: bool
    look_up: str


def find_table(rotary: nn.Module) -> TableSource | None:
    """The table of one of vLLM's rotary modules; None for any other module.

    Raises:
        UnsupportedLayerError: for a table that is used differently by length.
    """
    if isinstance(rotary, Phi3LongRoPEScaledRotaryEmbedding):
        # One table for short texts, another behind it; chosen by the resident bound.
        if rotary.use_long_rope:
            raise UnsupportedLayerError(
                f"its longrope frequencies switch at "
                f"{rotary.original_max_position_embeddings} tokens, below the "
                "resident bound: set --max-model-len to that at most"
            )
        length = rotary.original_max_position_embeddings
        return TableSource(
            "long_short_cos_sin_cache",
            length,
            amplitude=float(rotary.short_mscale),
            interleaved=False,
            look_up="forward",
        )
    table = getattr(rotary, "cos_sin_cache", None)
    if not isinstance(rotary, RotaryEmbeddingBase) or not isinstance(table, Tensor):
        return None
    # Exact where the module names it; the table may be rounded to bfloat16.
    named = getattr(rotary, "mscale", None)
    return TableSource(
        "cos_sin_cache",
        len(table),
        amplitude=None if named is None else float(named),
        interleaved=not rotary.is_neox_style,
        look_up="_forward_method",
    )


def read_geometry(rotary: nn.Module) -> RotaryGeometry:
    """Read the geometry of one of vLLM's rotary modules, and prove it.

    The frequencies come from the module's own formula in its own precision; a formula
    that does not reproduce the module's cos/sin table is not believed.

    Raises:
        UnsupportedLayerError: when no formula of the module explains its table.
    """
    source = find_table(rotary)
    if source is None:
        raise UnsupportedLayerError(
            f"its rotary module {type(rotary).__name__} has no cos/sin table to read"
        )
    table = getattr(rotary, source.name)[: source.length]
    table = table.detach().to("cpu", torch.float64)
    amplitude = float(table[0, 0]) if source.amplitude is None else source.amplitude
    with torch.device("cpu"):
        for frequencies in _candidate_frequencies(rotary):
            if explains(table, frequencies, amplitude):
                return RotaryGeometry(frequencies, amplitude, source.interleaved)
    raise UnsupportedLayerError(
        f"the frequencies of its rotary module {type(rotary).__name__} could not be "
        "read: they do not reproduce its cos/sin table"
    )


def _candidate_frequencies(rotary: Any) -> list[Tensor]:
    """What the module's formula gives for any of the module's numbers."""
    short = getattr(rotary, "short_factor", None)
    if short is not None:
        return [rotary._compute_inv_freq(short).to(torch.float64)]
    scaling = getattr(rotary, "scaling_factor", None)
    factors = getattr(rotary, "scaling_factors", [scaling] if scaling else [])
    candidates = []
    for argument in (rotary.base, *factors):
        frequencies = rotary._compute_inv_freq(argument).to(torch.float64)
        candidates += [frequencies, *(frequencies / factor for factor in factors)]
    return candidates


class VllmRotations(StepRotations):
    """Serves one of vLLM's rotary modules, which rotates by a cos/sin table.

    Owns a copy of the module: vLLM shares one among all engines of a process.

    Attributes:
        rotary: the copy, with a table of the step's rows.
    """

    def __init__(self, rotary: nn.Module, query_limit: int, max_tokens: int) -> None:
        """Copy ``rotary`` and replace the copy's table and look-up.

        Args:
            rotary: a rotary module of the loaded model.
            query_limit: where queries stay for the sinks, ``C = S + R``.
            max_tokens: the most tokens of a step, padding included.
        """
        geometry = read_geometry(rotary)
        source = find_table(rotary)
        assert source is not None
        self.table_name = source.name
        # A copy: a sleeping engine saves what belongs to a module, and drops the rest.
        self.trained: Tensor = getattr(rotary, source.name)[: source.length].clone()
        device = self.trained.device
        super().__init__(geometry, source.length, query_limit, max_tokens, device)
        self.rotary = copy.deepcopy(rotary)
        table = self.trained.new_zeros(self.sink_rotation.shape)
        setattr(self.rotary, source.name, table)
        look_up = getattr(self.rotary, source.look_up)
        batch_rows = torch.arange(max_tokens, device=device)

        def rotate(positions: Tensor, *args: Any, **kwargs: Any) -> Any:
            return look_up(batch_rows[: positions.shape[0]], *args, **kwargs)

        setattr(self.rotary, source.look_up, rotate)
        self.pairs = torch.arange(geometry.rotary_dim // 2, device=device).int()

    def row_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both halves of the copy's table."""
        cos, sin = getattr(self.rotary, self.table_name).chunk(2, dim=-1)
        return cos, sin, self.pairs

    def trained_rows(self, positions: Tensor) -> Tensor:
        """Rows of vLLM's table."""
        return self.trained.index_select(0, positions)

    def set_rows(self, rows: Tensor) -> None:
        """Set the copy's table."""
        # Looked up each time: vLLM replaces the table when it casts it.
        getattr(self.rotary, self.table_name)[: len(rows)].copy_(rows)
