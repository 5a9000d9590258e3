# SPDX-License-Identifier: Apache-2.0
"""Gives every attention layer of a loaded model the rotations of its tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from sink_paged.attention.backend import SinkAttentionImpl
from sink_paged.rotary import StepRotations, UnsupportedLayerError


def bind_rotations(model: nn.Module, max_tokens: int) -> list[StepRotations]:
    """Give each attention layer of ``model`` the rotations of the step's tokens.

    Args:
        model: the loaded model; its rotary modules are found beside the attention
            layers, not listed by name.
        max_tokens: the most tokens of a step.

    Returns:
        One ``StepRotations`` for each distinct rotary module.

    Raises:
        UnsupportedLayerError: naming the layer whose positions cannot be had right.
    """
    rotations: dict[nn.Module, StepRotations] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Attention):
            continue
        try:
            impl = layer.impl
            if not isinstance(impl, SinkAttentionImpl):
                raise UnsupportedLayerError(f"it runs on {type(impl).__name__}")
            impl.check_supported()
            parent = model.get_submodule(name.rpartition(".")[0])
            attribute, rotary = _sibling_rotary(parent)
            if rotary not in rotations:
                rotations[rotary] = StepRotations(
                    rotary, impl.window.capacity, max_tokens
                )
            impl.rotations = rotations[rotary]
            setattr(parent, attribute, impl.rotations.rotary)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(
                f"sink eviction does not support layer {name} "
                f"({type(layer).__name__}): {error}"
            ) from None
    if not rotations:
        raise UnsupportedLayerError(
            f"sink eviction does not support {type(model).__name__}: no attention "
            "layer with rotary positions was found in it"
        )
    steps = list(rotations.values())

    def set_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        for step in steps:
            step.set_positions(positions)

    model.register_forward_pre_hook(set_positions, with_kwargs=True)
    return steps


def _sibling_rotary(parent: nn.Module) -> tuple[str, RotaryEmbeddingBase]:
    """Name and module of the rotary embedding that serves ``parent``'s attention."""
    found = [
        (name, child)
        for name, child in parent.named_children()
        if isinstance(child, RotaryEmbeddingBase)
    ]
    if len(found) != 1:
        raise UnsupportedLayerError(
            f"{len(found)} rotary embeddings stand beside it, expected 1 (learned "
            "absolute, ALiBi and other position schemes are not supported)"
        )
    return found[0]
