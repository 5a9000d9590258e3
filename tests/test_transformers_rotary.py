# SPDX-License-Identifier: Apache-2.0
"""Rotary modules of Hugging Face: geometry, bits, far positions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.rotary import UnsupportedLayerError
from sink_paged.transformers_rotary import TransformersRotations
from tests.families import FAMILIES, make_model
from tests.test_rotary import exact_rotation

CAPACITY = 100
ALL = [family for family in FAMILIES if not family.startswith("Gemma 3")]


def rotary_of(family: str) -> Any:
    for module in make_model(family).modules():
        if "RotaryEmbedding" in type(module).__name__:
            return module
    raise AssertionError(family)


def call(rotary: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rotary(torch.empty(0, dtype=dtype), position_ids=positions[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_below_the_trained_length(dtype: torch.dtype) -> None:
    for family in ALL:
        rotary = rotary_of(family)
        if rotary.rope_type == "longrope":
            continue
        steps = TransformersRotations(rotary, CAPACITY, 256)
        positions = torch.randperm(256)
        steps.set_positions(positions)
        mine = call(steps.rotary, positions, dtype)
        theirs = call(rotary, positions, dtype)
        assert all(map(torch.equal, mine, theirs)), family


@pytest.mark.parametrize(
    "family", ["Pythia, GPT-NeoX", "Llama, YaRN", "Cohere", "gpt-oss"]
)
def test_far_positions_against_exact_angles(family: str) -> None:
    """In every layout of the output: halves, pairs, and once."""
    steps = TransformersRotations(rotary_of(family), CAPACITY, 8)
    far = [10**6, 10**8 + 7, MAX_STREAM_TOKENS - 1]
    steps.set_positions(torch.tensor(far))
    cos, _ = call(steps.rotary, torch.tensor(far), torch.float32)
    _, sin = call(steps.rotary, torch.tensor(far), torch.float32)
    geometry = steps.geometry
    for row, position in enumerate(far):
        exact = geometry.amplitude * exact_rotation(position, geometry.frequencies)
        exact_cos, exact_sin = exact.chunk(2)
        assert (cos[0, row] - steps.expand(exact_cos)).abs().max() < 2e-6
        assert (sin[0, row] - steps.expand(exact_sin)).abs().max() < 2e-6


def test_unreadable_modules_are_refused() -> None:
    rotary = rotary_of("Pythia, GPT-NeoX")
    rotary.attention_scaling = 1.0
    rotary.inv_freq.mul_(1.5)
    own = type(rotary).forward

    def other_frequencies(x: Tensor, position_ids: Tensor) -> Any:
        return own(rotary, x, position_ids * 2)

    rotary.forward = other_frequencies
    with pytest.raises(UnsupportedLayerError, match="could not be read"):
        TransformersRotations(rotary, CAPACITY, 8)
    rotary.rope_type = "dynamic"
    with pytest.raises(UnsupportedLayerError, match="rope_type dynamic, not one of"):
        TransformersRotations(rotary, CAPACITY, 8)
