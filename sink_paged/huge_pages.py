# SPDX-License-Identifier: Apache-2.0
"""Huge pages for the KV cache of a CPU.

A decode reads a cache far larger than the CPU's table of 4 KiB pages once a layer;
with pages of 2 MiB it does not wait for their addresses. Linux gives them to programs
that ask (`/sys/kernel/mm/transparent_hugepage/enabled` set to `madvise`), or to all.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # asm-generic/mman-common.h


@functools.cache
def _find_madvise() -> Callable[..., Any] | None:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def clear_to_huge_pages(tensor: Tensor) -> bool:
    """Fill a CPU tensor's storage with zeros, in huge pages where the system has them.

    The memory it had goes back first: to move it into huge pages would take seconds a
    GiB.

    Returns:
        Whether the system took the advice.
    """
    storage, madvise = tensor.untyped_storage(), _find_madvise()
    begin = -(-storage.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (storage.data_ptr() + storage.nbytes()) // HUGE_PAGE * HUGE_PAGE
    taken = False
    if madvise is not None and begin < end:
        taken = madvise(begin, end - begin, _MADV_HUGEPAGE) == 0
        if taken:
            madvise(begin, end - begin, _MADV_DONTNEED)
    torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
    return taken
