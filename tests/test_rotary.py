# SPDX-License-Identifier: Apache-2.0
"""Rotations at any text position, and the geometry read from vLLM's rotary modules."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from sink_paged.attention.reference import rotate
from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.rotary import RotationTables, UnsupportedLayerError
from sink_paged.vllm_rotary import VllmRotations, read_geometry

TRAINED = 512
CAPACITY = 300
FAR = [512, 513, 4096, 10**6, 4 * 10**6 + 3, 10**8 + 7, MAX_STREAM_TOKENS - 1]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 500000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
}


def make_rotary(scaling: str, dtype: torch.dtype, neox: bool = True) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            64,
            max_position=TRAINED,
            is_neox_style=neox,
            rope_parameters=SCALINGS[scaling],
            dtype=dtype,
        )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neox", [True, False])
def test_bit_for_bit_below_the_trained_length(
    scaling: str, dtype: torch.dtype, neox: bool
) -> None:
    rotary = make_rotary(scaling, dtype, neox)
    stock = rotary.cos_sin_cache.clone()
    steps = VllmRotations(rotary, CAPACITY, max_tokens=len(stock))
    positions = torch.randperm(len(stock))
    steps.set_positions(positions)
    query = torch.randn(len(stock), 3 * 64).to(dtype)
    key = torch.randn(len(stock), 64).to(dtype)
    expected = rotary.forward_native(positions, query.clone(), key.clone())
    actual = steps.rotary.forward_native(
        torch.arange(len(stock)), query.clone(), key.clone()
    )
    looked_up = steps.rotary(positions, query.clone(), key.clone())
    assert torch.equal(rotary.cos_sin_cache, stock), "the shared module was changed"
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
    stock_call = rotary(positions, query.clone(), key.clone())
    for mine, theirs in zip(looked_up, stock_call, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_far_positions_against_exact_angles(scaling: str) -> None:
    """Against cos and sin of the exact product position * frequency."""
    rotary = make_rotary(scaling, torch.float32)
    geometry = read_geometry(rotary)
    steps = VllmRotations(rotary, CAPACITY, max_tokens=64)
    length = len(steps.trained)
    positions = [length + p for p in FAR if length + p < MAX_STREAM_TOKENS]
    steps.set_positions(torch.tensor(positions))
    rows = steps.rotary.cos_sin_cache[: len(positions)].double()
    sinks = steps.sink_rotation[: len(positions)].double()
    exact = [exact_rotation(p, geometry.frequencies) for p in positions]
    assert (rows - geometry.amplitude * torch.stack(exact)).abs().max() < 2e-6
    back = [exact_rotation(CAPACITY - p, geometry.frequencies) for p in positions]
    assert (sinks - torch.stack(back)).abs().max() < 2e-6


def exact_rotation(position: int, frequencies: Tensor) -> Tensor:
    """``cos | sin`` of ``position * frequency`` with the product taken exactly."""
    from mpmath import mp, mpf

    with mp.workdps(50):
        angles = [mpf(position) * mpf(f) for f in frequencies.tolist()]
        values = [float(mp.cos(a)) for a in angles] + [float(mp.sin(a)) for a in angles]
    return torch.tensor(values, dtype=torch.float64)


def test_queries_before_the_capacity_are_not_rotated_again() -> None:
    steps = VllmRotations(make_rotary("default", torch.float32), CAPACITY, 8)
    steps.set_positions(torch.tensor([0, 1, CAPACITY - 1, CAPACITY]))
    cos, sin = steps.sink_rotation[:4].chunk(2, dim=-1)
    assert torch.equal(cos, torch.ones_like(cos))
    assert torch.equal(sin, torch.zeros_like(sin))


@pytest.mark.parametrize("far", [0, 10**6, 10**8])
def test_scores_depend_on_distances_only(far: int) -> None:
    """A window key scores by its true distance, a sink by its distance to ``C``."""
    rotary = make_rotary("default", torch.float32)
    steps = VllmRotations(rotary, CAPACITY, 8)
    near_query, near_key, sink = CAPACITY + 40, CAPACITY + 23, 2
    positions = torch.tensor([near_query + far, near_key + far, sink])
    steps.set_positions(positions)
    rows = torch.randn(3, 64)
    rotated, _ = steps.rotary(positions, rows.clone())
    cos, sin = steps.sink_rotation[0].chunk(2)
    to_sink = rotate(rotated[0], cos, sin)
    reference, _ = rotary(torch.tensor([17, 0]), rows[:2].clone())
    assert float(
        rotated[0] @ rotated[1] - reference[0] @ reference[1]
    ) == pytest.approx(0, abs=2e-4)
    reference, _ = rotary(torch.tensor([CAPACITY - sink, 0]), rows[[0, 2]].clone())
    assert float(to_sink @ rotated[2] - reference[0] @ reference[1]) == pytest.approx(
        0, abs=2e-4
    )


def test_tables_cover_every_position() -> None:
    tables = RotationTables(torch.tensor([1.0]).double(), torch.device("cpu"))
    last = tables(torch.tensor([MAX_STREAM_TOKENS]))
    exact = exact_rotation(MAX_STREAM_TOKENS, torch.tensor([1.0]).double())
    assert abs(float(last.real) - float(exact[0])) < 1e-6


def test_unreadable_frequencies_are_refused() -> None:
    rotary = copy.deepcopy(make_rotary("default", torch.float32))
    rotary.cos_sin_cache[100:] = 0.5
    with pytest.raises(UnsupportedLayerError, match="do not reproduce"):
        read_geometry(rotary)
