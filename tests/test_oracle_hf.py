# SPDX-License-Identifier: Apache-2.0
"""The oracle of the model families is validated before it judges."""

import pytest
import torch

from tests.engines import worst
from tests.families import FAMILIES, SLIDING, make_model, text
from tests.oracle import StreamingOracle, stream_greedy, stream_losses
from tests.oracle_hf import StreamingModel


@pytest.mark.parametrize("family", FAMILIES)
def test_short_text_is_the_models_own(family: str) -> None:
    """Nothing evicted by ``S+R``: the model's dense forward pass, bar its own windows.

    The oracle keeps native windows itself; the model masks them.
    """
    ids = text(90)
    model = make_model(family)
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    dense = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    losses = stream_losses(StreamingModel(model, 4, 200), ids)
    assert worst(losses, dense.tolist()) < 2e-4


@pytest.mark.parametrize("family", ["Llama (MHA)", "Llama (GQA)"])
def test_evicting_it_is_the_llama_oracle(family: str) -> None:
    """Which is checked against the 2023 reference code."""
    ids = text(300)
    for sinks in ((4, 60), (0, 30)):
        expected = stream_losses(StreamingOracle(make_model(family), *sinks), ids)
        actual = stream_losses(StreamingModel(make_model(family), *sinks), ids)
        assert worst(actual, expected) < 1e-4


def test_a_native_window_is_a_window_without_sinks() -> None:
    ids = text(200)
    native = stream_losses(StreamingModel(make_model(SLIDING), 4, 100), ids)
    plain = stream_losses(StreamingModel(make_model(SLIDING), 0, 63, False), ids)
    sinks = stream_losses(StreamingModel(make_model(SLIDING), 4, 59, False), ids)
    assert native == plain
    assert worst(native, sinks) > 0.1


def test_positions_are_pronounced() -> None:
    """A wrong window shows in the losses of every family."""
    ids = text(90)
    for family in FAMILIES:
        native = family != SLIDING
        right = stream_losses(StreamingModel(make_model(family), 4, 40, native), ids)
        wrong = stream_losses(StreamingModel(make_model(family), 4, 41, native), ids)
        assert worst(right, wrong) > 0.01, family


def test_greedy_continuation() -> None:
    model = make_model("Llama (GQA)")
    tokens, gaps = stream_greedy(StreamingModel(model, 4, 60), text(20), 100)
    expected = stream_greedy(
        StreamingOracle(make_model("Llama (GQA)"), 4, 60), text(20), 100
    )
    assert tokens == expected[0]
    assert len(gaps) == 100
