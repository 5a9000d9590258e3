# SPDX-License-Identifier: Apache-2.0
"""How a kernel gets compiled, its memory and its threads.

Kernels are compiled at the first `load_kernels`, which takes many seconds, and cached
on disk: beside this file, in the user's cache directory, or in `NUMBA_CACHE_DIR`.
"""

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numba import cfunc, types
from numba.core.event import Event, Listener, install_listener
from torch import Tensor

from sink_paged.attention import kernel
from sink_paged.attention import store as writer
from sink_paged.attention.tiles import HAS_AMX

SOURCES = (
    "arguments.py",
    "chunk.py",
    "few.py",
    "kernel.py",
    "launch.py",
    "matmul.py",
    "online_softmax.py",
    "pages.py",
    "rows.py",
    "simd.py",
    "softmax.py",
    "store.py",
    "tiles.py",
)
ALIGNMENT = 64


class Kernels(NamedTuple):
    """Compiled entries, `void (*)(void *arguments)`, as `CFunc` of numba."""

    attend: Any
    store: Any


def _hash_sources() -> str:
    folder = Path(__file__).parent
    texts = b"".join((folder / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(texts).hexdigest()


class _Announcer(Listener):
    """Says once that a kernel is being compiled, which is known when it has begun."""

    def __init__(self) -> None:
        self._announced = False

    def on_start(self, event: Event) -> None:
        if not self._announced:
            # Only here: vLLM takes longer to import than all of this package.
            from vllm.logger import init_logger

            # vLLM shows INFO of its own loggers only.
            logger = init_logger(f"vllm.{__name__}")
            logger.info("Compiling the attention kernel, once for this machine.")
        self._announced = True

    def on_end(self, event: Event) -> None:
        pass


def _compile(entry: Callable[[int], None]) -> Any:
    """Compile an entry, or load it from the cache where there is one to write."""
    signature = types.void(types.int64)
    try:
        return cfunc(signature, cache=True, error_model="numpy")(entry)
    except (RuntimeError, OSError):  # numba can write to no directory
        return cfunc(signature, error_model="numpy")(entry)


@functools.cache
def load_kernels() -> Kernels:
    """Compile the kernels or load them from the cache; takes its time only once."""
    # numba keys its cache by the values in the closure of an entry, and knows nothing
    # of the functions that the entry calls: the hash stands for them all.
    sources = _hash_sources()

    def attend(args: int) -> None:
        _ = sources
        kernel.attend(args)

    def store(args: int) -> None:
        _ = sources
        writer.store(args)

    with install_listener("numba:compile", _Announcer()):
        return Kernels(_compile(attend), _compile(store))


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether the CPU has bfloat16 matrix tiles and Linux grants them to us."""
    return (
        HAS_AMX and torch.cpu._is_amx_tile_supported() and bool(torch.cpu._init_amx())
    )


@functools.cache
def _find_parallel() -> Callable[..., Any] | None:
    """`GOMP_parallel` of the OpenMP runtime that torch runs on, if it can be found.

    libgomp has it, and Intel's runtime, which vLLM may preload, for compatibility.
    Torch's own pool keeps the threads where vLLM has pinned them, and none is added.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    parallel.restype = None
    return parallel


class Scratch(NamedTuple):
    """Memory of a kernel's threads: what keeps it alive, its aligned address."""

    memory: Tensor
    address: int
    nbytes: int


_local = threading.local()


def reserve_scratch(nbytes: int) -> Scratch:
    """At least `nbytes` of scratch memory of the calling thread."""
    scratch: Scratch | None = getattr(_local, "scratch", None)
    if scratch is None or scratch.nbytes < nbytes:
        memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        address = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        scratch = _local.scratch = Scratch(memory, address, nbytes)
    return scratch


def bind(kernel: Any, arguments: int, num_threads: int) -> Callable[[], object]:
    """A call that runs a kernel on the arguments at an address, on torch's threads."""
    parallel = _find_parallel() if num_threads > 1 else None
    if parallel is None:
        return functools.partial(kernel.ctypes, arguments)
    return functools.partial(parallel, kernel.address, arguments, num_threads, 0)
