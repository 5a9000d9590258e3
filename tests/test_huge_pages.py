# SPDX-License-Identifier: Apache-2.0
"""Cleared memory is zero, and of huge pages where Linux has them."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sink_paged.huge_pages import clear_to_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib(tensor: Tensor) -> int:
    """KiB in huge pages of the mapping that holds a tensor's middle."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            total = int(line.split()[1])
    return total


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="this system gives no transparent huge pages",
)
def test_large_tensor() -> None:
    """64 MiB that were in use, through a view of a part."""
    tensor = torch.arange(16 << 20, dtype=torch.int32)
    assert clear_to_huge_pages(tensor[100:200])
    assert not tensor.any()
    assert huge_kib(tensor) >= 32 << 10


def test_small_tensor() -> None:
    """Less than a huge page is cleared in place."""
    tensor = torch.ones(1000)
    assert not clear_to_huge_pages(tensor)
    assert not tensor.any()
