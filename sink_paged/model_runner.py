# SPDX-License-Identifier: Apache-2.0
"""Gives every attention layer of a loaded model the rotations of its tokens.

The rows of a step are set by a hook that runs when the whole model is called. It reads
the runner's own buffer of positions, writes into buffers of its own and launches
kernels only, so it does not matter whether it runs or is replayed:

- eager, compiled and piecewise graphs (``CUDAGraphMode.NONE`` and ``PIECEWISE``): the
  runner calls the model at each step; what is replayed are parts inside of it, which
  find the rows where they were captured.
- full graphs: vLLM captures a call of the model, hook included, on a slice of that same
  buffer (V1: ``CUDAGraphWrapper`` around the model; V2: ``CudaGraphManager.capture``),
  and refills the buffer before it replays. Breakable graphs capture the same call.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from sink_paged.attention.backend import SinkAttentionImpl
from sink_paged.config import StreamConfig
from sink_paged.probe import prove_rotations
from sink_paged.rotary import StepRotations, UnsupportedLayerError
from sink_paged.transformers_rotary import (
    BatchRows,
    TransformersRotations,
    is_transformers_rotary,
)
from sink_paged.vllm_rotary import VllmRotations, find_table


def bind_rotations(
    model: nn.Module, vllm_config: VllmConfig, stream: StreamConfig, max_tokens: int
) -> list[StepRotations]:
    """Give each attention layer of ``model`` the rotations of the step's tokens.

    Args:
        model: the loaded model; its rotary modules are found near the attention
            layers, not listed by name.
        vllm_config: of the worker.
        stream: the settings as resolved for the model.
        max_tokens: the most tokens of a step.

    Returns:
        One ``StepRotations`` for each distinct rotary module.

    Raises:
        UnsupportedLayerError: naming the layer whose positions cannot be had right.
    """
    layers = attention_layers(model)
    rotations: dict[nn.Module, StepRotations] = {}
    for name, layer in layers.items():
        try:
            impl = layer.impl
            if not isinstance(impl, SinkAttentionImpl):
                raise UnsupportedLayerError(f"it runs on {type(impl).__name__}")
            impl.check_supported()
            if impl.alibi_slopes is not None:
                if stream.positions != "cache":
                    raise UnsupportedLayerError(
                        "positions in the text are for rotary models, it has ALiBi"
                    )
                continue  # biased by distance; the proof finds one that rotates too
            owner, attribute, rotary = _nearest_rotary(model, name)
            if rotary not in rotations:
                step = make_rotations(rotary, stream.query_limit, max_tokens)
                # The next layers find the substitute where they look for the module.
                rotations[rotary] = rotations[step.rotary] = step
            impl.rotations = rotations[rotary]
            setattr(owner, attribute, impl.rotations.rotary)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(
                f"sink eviction does not support layer {name} "
                f"({type(layer).__name__}): {error}"
            ) from None
    if not layers:
        raise UnsupportedLayerError(
            f"sink eviction does not support {type(model).__name__}: no attention "
            "layer was found in it"
        )
    steps = list(dict.fromkeys(rotations.values()))

    def set_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        for step in steps:
            step.set_positions(positions)

    model.register_forward_pre_hook(set_positions, with_kwargs=True)
    prove_rotations(model, layers, vllm_config)
    if not all(bool(step.sink_rotation[0].any()) for step in steps):
        raise UnsupportedLayerError(
            f"sink eviction does not support {type(model).__name__}: it is called "
            "without its forward hooks, so that its positions are not seen"
        )
    return steps


def attention_layers(model: nn.Module) -> dict[str, Attention]:
    """The attention layers of ``model`` by name, or by where they are called.

    vLLM 0.29's Transformers backend has its layers beside the modules, in a dict of its
    own by the ``layer_idx`` of the Hugging Face module that calls them.
    """
    modules = dict(model.named_modules())
    layers = {name: x for name, x in modules.items() if isinstance(x, Attention)}
    if layers:
        return layers
    beside: dict[int, Attention] = getattr(model, "attention_instances", {})
    return {
        f"{name}.attn": beside[x.layer_idx]
        for name, x in modules.items()
        if "Attention" in type(x).__name__ and getattr(x, "layer_idx", None) in beside
    }


def make_rotations(
    rotary: nn.Module, query_limit: int, max_tokens: int
) -> StepRotations:
    """The rotations of a rotary module, whoever wrote it."""
    if is_transformers_rotary(rotary):
        return TransformersRotations(rotary, query_limit, max_tokens)
    return VllmRotations(rotary, query_limit, max_tokens)


def _nearest_rotary(model: nn.Module, layer: str) -> tuple[nn.Module, str, nn.Module]:
    """The rotary module beside ``layer``, or else above it.

    vLLM's models have one in each attention module, Hugging Face's have one that
    serves all layers.

    Returns:
        The module's parent, its name there, and the module.
    """
    path = layer
    while path:
        path = path.rpartition(".")[0]
        parent = model.get_submodule(path)
        found = [
            (parent, name, child)
            for name, child in parent.named_children()
            if isinstance(child, RotaryEmbeddingBase | BatchRows)
            or find_table(child) is not None
            or is_transformers_rotary(child)
        ]
        if len(found) > 1:
            raise UnsupportedLayerError(
                f"{len(found)} rotary embeddings stand beside each other in "
                f"{path or type(model).__name__}; which is its own cannot be read"
            )
        if found:
            return found[0]
    raise UnsupportedLayerError(
        "no rotary embedding was found beside it or above it (learned absolute and "
        "other position schemes are not supported)"
    )
