# SPDX-License-Identifier: Apache-2.0
"""Rotary modules of Hugging Face, in models that vLLM runs through its Transformers
modelling backend (GPT-NeoX and Pythia, Phi, OLMo 2 and others).

Such a module stands once in the model, above the attention layers, and returns the cos
and sin of the positions; the layers' code applies them. Which dims form a pair is
therefore not written in the module; :mod:`sink_paged.probe` finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sink_paged.rotary import (
    RotaryGeometry,
    StepRotations,
    UnsupportedLayerError,
    explains,
)

# How the cos or sin of the pairs, [..., n], become the module's output: as they are,
# once for each half of the rotated dims, or twice in a row.
LAYOUTS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]], ...]
LAYOUTS = (
    (lambda pairs: pairs, lambda output, n: output),
    (lambda pairs: torch.cat((pairs, pairs), -1), lambda output, n: output[..., :n]),
    (lambda pairs: pairs.repeat_interleave(2, -1), lambda output, n: output[..., ::2]),
)
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies do not depend on the length."""


def is_transformers_rotary(module: nn.Module) -> bool:
    """Whether ``module`` is a rotary module in Hugging Face's form."""
    return isinstance(getattr(module, "inv_freq", None), Tensor) and hasattr(
        module, "attention_scaling"
    )


class TransformersRotations(StepRotations):
    """Serves one rotary module of Hugging Face.

    Attributes:
        rotary: returns the cos and sin of the step's tokens.
    """

    style_is_open = True

    def __init__(self, rotary: Any, query_limit: int, max_tokens: int) -> None:
        """Read and prove the module's geometry, and make its substitute.

        Args:
            rotary: a rotary module of the loaded model.
            query_limit: where queries stay for the sinks, ``C = S + R``.
            max_tokens: the most tokens of a step, padding included.

        Raises:
            UnsupportedLayerError: when the module does not return
                ``attention_scaling * cos(position * inv_freq)`` and the like.
        """
        name = type(rotary).__name__
        kind = getattr(rotary, "rope_type", None)
        if kind not in STATIC_ROPE_TYPES:
            raise UnsupportedLayerError(
                f"its rotary module {name} has rope_type {kind}, not one of "
                f"{', '.join(STATIC_ROPE_TYPES)}"
            )
        self.original = rotary
        device = rotary.inv_freq.device
        frequencies = rotary.inv_freq.detach().to("cpu", torch.float64)
        self.pairs = frequencies.numel()
        trained_length = int(rotary.max_seq_len_cached)
        amplitude = float(rotary.attention_scaling)
        cos, sin = self.call(torch.arange(trained_length, device=device))
        for expand, shrink in LAYOUTS:
            table = torch.cat((shrink(cos, self.pairs), shrink(sin, self.pairs)), -1)
            if (
                table.shape[-1] == 2 * self.pairs
                and torch.equal(expand(shrink(cos, self.pairs)), cos)
                and torch.equal(expand(shrink(sin, self.pairs)), sin)
                and explains(table.to("cpu", torch.float64), frequencies, amplitude)
            ):
                self.expand, self.shrink = expand, shrink
                self.trained = table
                break
        else:
            raise UnsupportedLayerError(
                f"the frequencies of its rotary module {name} could not be read: they "
                "do not reproduce the cos and sin that it returns"
            )
        super().__init__(
            RotaryGeometry(frequencies, amplitude, interleaved=False),
            trained_length,
            query_limit,
            max_tokens,
            device,
        )
        half = torch.empty(0, dtype=torch.bfloat16, device=device)
        position = torch.zeros(1, 1, dtype=torch.long, device=device)
        casts = rotary(half, position_ids=position)[0].dtype == torch.bfloat16
        self.rotary = BatchRows(max_tokens, cos.shape[-1], casts, device)
        pairs = torch.arange(self.pairs, dtype=torch.int32, device=device)
        self.columns = self.expand(pairs).contiguous()

    def call(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The module's float32 cos and sin, ``[num_tokens, width]`` each."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = self.original(like, position_ids=positions[None])
        return cos[0], sin[0]

    def trained_rows(self, positions: Tensor) -> Tensor:
        """What the module returns."""
        cos, sin = self.call(positions)
        return torch.cat(
            (self.shrink(cos, self.pairs), self.shrink(sin, self.pairs)), 1
        )

    def row_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The substitute's rows."""
        return self.rotary.cos, self.rotary.sin, self.columns

    def set_rows(self, rows: Tensor) -> None:
        """Set what the substitute returns."""
        cos, sin = rows.chunk(2, dim=-1)
        self.rotary.cos[: len(rows)].copy_(self.expand(cos))
        self.rotary.sin[: len(rows)].copy_(self.expand(sin))


class BatchRows(nn.Module):
    """Returns prepared cos and sin for the tokens of the batch, in their order.

    Attributes:
        casts: returns them in the hidden states' dtype, not in float32.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, max_tokens: int, width: int, casts: bool, device: torch.device
    ) -> None:
        """Float32 rows for up to ``max_tokens`` tokens."""
        super().__init__()
        self.casts = casts
        for name in ("cos", "sin"):
            rows = torch.zeros(max_tokens, width, dtype=torch.float32, device=device)
            self.register_buffer(name, rows, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the batch, ``[1, num_tokens, width]`` each."""
        num_tokens = position_ids.shape[-1]
        cos, sin = self.cos[None, :num_tokens], self.sin[None, :num_tokens]
        return (cos.to(x.dtype), sin.to(x.dtype)) if self.casts else (cos, sin)
