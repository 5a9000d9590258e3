# SPDX-License-Identifier: Apache-2.0
"""Muon in float32: momentum, orthogonalised (Jordan et al., 2024; Liu et al., 2025).

``torch.optim.Muon`` orthogonalises in bfloat16, one matrix after the other. A CPU
without bfloat16 products needs longer for that than for a pocket model's forward and
backward passes together; here matrices of one shape go through the iteration at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic Newton-Schulz step."""
STEPS = 5


class Muon(torch.optim.Optimizer):
    """For matrices ``[rows, columns]``; updates have AdamW's usual root mean square."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Take the matrices.

        Args:
            params: to train.
            lr: learning rate, as one would set AdamW's.
            weight_decay: decoupled, a share of ``lr``.
            momentum: of the gradients, Nesterov's.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the matrices that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    shapes[param.shape].append(param)
            for shape, params in shapes.items():
                gradients = torch.stack([param.grad for param in params])
                updates = orthogonalize(self._moved(params, gradients, group))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(update, alpha=rate)

    def _moved(self, params: list[Tensor], gradients: Tensor, group: Any) -> Tensor:
        """Gradients ``[matrices, rows, columns]`` with momentum."""
        for param, gradient in zip(params, gradients, strict=True):
            state = self.state[param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(param)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
        averages = torch.stack([self.state[param]["momentum"] for param in params])
        return gradients.lerp(averages, group["momentum"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, about: singular values of 0.7 to 1.2.

    Args:
        matrices: float32 ``[matrices, rows, columns]``.
    """
    first, second, third = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    result = matrices if wide else matrices.mT
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = result @ result.mT
        result = first * result + (second * gram + third * gram @ gram) @ result
    return result if wide else result.mT
