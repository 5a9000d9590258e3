# SPDX-License-Identifier: Apache-2.0
"""Proof by experiment that every layer's positions are what was read from the model.

The second rotation of a query is right only if a query is the rotation, by its
position, of something that does not depend on the position. The model is run twice on
a few tokens, at position 0 and at others, near and far, and what arrives at each
attention layer is compared. That refuses learned absolute positions, normalisation
behind the rotation, scales that grow with the text and everything else that no
inspection of modules would find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from sink_paged.attention.backend import SinkAttentionImpl
from sink_paged.config import MAX_STREAM_TOKENS
from sink_paged.rotary import StepRotations, UnsupportedLayerError, rotate

POSITIONS = (1_000_000_007, 1, 3, 10, 100, 1_000, 10_000_019, MAX_STREAM_TOKENS - 1)
NUM_TOKENS = 2 * len(POSITIONS)
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of a query's largest entry; what is not a rotation differs by about all of it."""


def count_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of the proof's steps; no more than any step of the worker may have."""
    return min(NUM_TOKENS, vllm_config.scheduler_config.max_num_batched_tokens)


def prove_rotations(
    model: nn.Module, layers: Mapping[str, Attention], vllm_config: VllmConfig
) -> None:
    """Check the rotation of every attention layer, and settle which dims pair.

    Args:
        model: the loaded model, its layers bound to their rotations.
        layers: its attention layers by name.
        vllm_config: of the worker.

    Raises:
        UnsupportedLayerError: naming the layer whose queries or keys do not rotate
            as its ``rotations`` say.
    """
    tolerance = TOLERANCES[vllm_config.model_config.dtype]
    positions = torch.tensor(list(islice(cycle(POSITIONS), count_tokens(vllm_config))))
    at_zero = _run(model, layers, torch.zeros_like(positions), vllm_config)
    moved = _run(model, layers, positions, vllm_config)
    styles: dict[StepRotations, set[bool]] = {}
    for name, layer in layers.items():
        impl = layer.impl
        assert isinstance(impl, SinkAttentionImpl)
        step = impl.rotations
        fitting = {
            interleaved
            for interleaved in (False, True)
            if all(
                _rotates(before, after, positions, step, interleaved, tolerance)
                for before, after in zip(at_zero[name], moved[name], strict=True)
            )
        }
        if step is not None:
            if not step.style_is_open:
                fitting &= {step.geometry.interleaved}
            fitting &= styles.setdefault(step, {False, True})
            styles[step] = fitting
        if not fitting:
            raise UnsupportedLayerError(
                f"sink eviction does not support layer {name} "
                f"({type(layer).__name__}): its queries and keys depend on the "
                "text position otherwise than by the rotation of its rotary module"
            )
    for step, fitting in styles.items():
        step.geometry = dataclasses.replace(
            step.geometry, interleaved=False not in fitting
        )


def _run(
    model: nn.Module,
    layers: Mapping[str, Attention],
    positions: Tensor,
    vllm_config: VllmConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and keys of each layer, ``[num_tokens, heads, head_size]`` float64."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def capture(
        layer: Attention,
        query: Tensor,
        key: Tensor,
        *_: object,
        output: Tensor,
        **__: object,
    ) -> Tensor:
        seen[layer.layer_name] = (query.double().cpu(), key.double().cpu())
        # What a layer adds must not depend on the position either.
        return output.zero_()

    device = next(model.parameters()).device
    vocabulary = vllm_config.model_config.get_vocab_size()
    tokens = torch.arange(len(positions), device=device) % vocabulary
    for layer in layers.values():
        layer.impl.forward = capture
    try:
        with (
            torch.inference_mode(),
            set_forward_context(
                None, vllm_config, num_tokens=len(positions), skip_compiled=True
            ),
        ):
            model(
                input_ids=tokens,
                positions=positions.to(device),
                intermediate_tensors=None,
                inputs_embeds=None,
            )
    finally:
        for layer in layers.values():
            del layer.impl.forward
    return {name: seen[layer.layer_name] for name, layer in layers.items()}


def _rotates(
    before: Tensor,
    after: Tensor,
    positions: Tensor,
    step: StepRotations | None,
    interleaved: bool,
    tolerance: float,
) -> bool:
    """Whether ``after`` is ``before`` rotated by ``positions``."""
    expected = before
    if step is not None:
        rotation = step.tables(positions.to(step.sink_rotation.device)).cpu()[:, None]
        expected = rotate(before, rotation.real, rotation.imag, interleaved=interleaved)
    error = (after - expected).abs().amax(dim=(1, 2))
    # Below the trained length the angles are the model's own, made in float32.
    trained = 0 if step is None else step.trained_length
    angle_error = torch.where(positions < trained, positions * 2**-22, 0.0)
    largest = before.abs().amax(dim=(1, 2))
    return bool((error <= (tolerance + angle_error) * largest).all())
