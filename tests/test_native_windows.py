# SPDX-License-Identifier: Apache-2.0
"""Models whose layers have sliding windows of their own."""

from pathlib import Path

import pytest

from tests.against_oracle import check_family
from tests.families import SLIDING


@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3", "gpt-oss"])
def test_global_layers_stream_and_sliding_layers_slide(
    family: str, tmp_path: Path
) -> None:
    check_family(family, tmp_path, (4, 60), 60)


def test_sinks_join_the_window_that_every_layer_has(tmp_path: Path) -> None:
    check_family(SLIDING, tmp_path, (4, 59), 60, keep_native=False)
