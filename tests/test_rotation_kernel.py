# SPDX-License-Identifier: Apache-2.0
"""The kernel that sets a step's rotations against eager code.

In Triton's interpreter, or on a GPU with ``TRITON_INTERPRET=0``.
"""

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.rotary import StepRotations
from sink_paged.transformers_rotary import TransformersRotations
from sink_paged.vllm_rotary import VllmRotations
from tests.test_rotary import CAPACITY, FAR, SCALINGS, make_rotary
from tests.test_transformers_rotary import rotary_of

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
BFLOAT16_STEP = 2**-7
"""Between bfloat16 numbers from 1 to 2."""
NEAR = [0, 1, 2, 63, CAPACITY, CAPACITY + 1, 511]
POSITIONS = torch.tensor([*NEAR, *FAR, 2**22 - 1, 2**22, 2**22 + 2**11, 2**30 + 12345])


def rows_of(steps: StepRotations) -> list[Tensor]:
    cos, sin, _ = steps.row_columns()
    return [part.float().cpu() for part in (cos, sin, steps.sink_rotation)]


def check(
    make: Callable[[torch.device], StepRotations], tolerance: float = 1e-7
) -> None:
    """The same rows from both; the model's own, bit for bit, where it has them."""
    steps = make(DEVICE)
    by_eager = make(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        # The model's own cosines, which are another device's up to a rounding.
        own = steps.trained_rows
        patch.setattr(by_eager, "trained_rows", lambda at: own(at.to(DEVICE)).cpu())
        by_eager.set_positions(POSITIONS)
    cos, sin, _ = steps.row_columns()
    for part in (cos, sin, steps.sink_rotation):
        part.fill_(float("nan"))
    steps.launch(POSITIONS.to(DEVICE))
    near = steps.trained_length > POSITIONS
    for mine, theirs in zip(rows_of(steps), rows_of(by_eager), strict=True):
        mine, theirs = mine[: len(POSITIONS)], theirs[: len(POSITIONS)]
        assert theirs.any()
        if tolerance == 1e-7:
            assert torch.equal(mine[near], theirs[near])
        error = (mine - theirs).abs().max()
        assert error <= tolerance * max(1.0, steps.geometry.amplitude)
    assert rows_of(steps)[0][len(POSITIONS) :].isnan().all(), "rows of no token"


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("neox", [True, False])
def test_rows_of_vllms_modules(scaling: str, neox: bool) -> None:
    rotary = make_rotary(scaling, torch.float32, neox)
    check(lambda device: VllmRotations(rotary.to(device), CAPACITY, 32))


def test_rows_in_the_models_dtype() -> None:
    """A bfloat16 model casts its table, and the copy's table, at the first step.

    Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds.
    """

    def with_cast_table(device: torch.device) -> VllmRotations:
        rotary = make_rotary("llama3", torch.float32).to(device)
        steps = VllmRotations(rotary, CAPACITY, 32)
        steps.rotary.cos_sin_cache = steps.rotary.cos_sin_cache.bfloat16()
        return steps

    check(with_cast_table, tolerance=BFLOAT16_STEP)
    rotary = make_rotary("yarn", torch.bfloat16)
    check(
        lambda device: VllmRotations(rotary.to(device), CAPACITY, 32),
        tolerance=BFLOAT16_STEP,
    )


@pytest.mark.parametrize(
    "family", ["Pythia, GPT-NeoX", "Llama, YaRN", "Cohere", "gpt-oss"]
)
def test_rows_of_hugging_face_modules(family: str) -> None:
    """In every layout of the output: halves, pairs, and once."""
    rotary = rotary_of(family)

    def steps_of_a_copy(device: torch.device) -> TransformersRotations:
        return TransformersRotations(copy.deepcopy(rotary).to(device), CAPACITY, 32)

    check(steps_of_a_copy)


def test_stale_positions_do_no_harm() -> None:
    """Behind a step's tokens the buffer may hold anything, also what is no position."""
    rotary = make_rotary("default", torch.float32).to(DEVICE)
    steps = VllmRotations(rotary, CAPACITY, 8)
    steps.launch(torch.tensor([5, -1, MAX_STREAM_TOKENS], device=DEVICE))
    expected = rows_of(steps)[0][0]
    steps.launch(torch.tensor([5], device=DEVICE))
    assert torch.equal(rows_of(steps)[0][0], expected)
