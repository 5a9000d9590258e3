# SPDX-License-Identifier: Apache-2.0
"""The register-tiled product, with the tiles of every CPU, against a plain product."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba
import pytest
import torch
from llvmlite import binding as llvm
from numba import types

from sink_paged.attention import matmul
from sink_paged.attention.cpu import pair_size

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
DEPTHS = (16, 33)


def load_matmul(avx512: bool, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a CPU with or without AVX-512 would import it."""
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"avx512f": avx512})
    name = f"{matmul.__name__}_{avx512}"
    spec = importlib.util.spec_from_file_location(name, Path(str(matmul.__file__)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    assert avx512 == module.AVX512
    return module


def compile_multiply(module: ModuleType) -> Callable[..., None]:
    """`multiply` as a function of fifteen integers."""
    signature = types.void(*[types.int64] * 15)
    compiled: Callable[..., None] = numba.cfunc(signature)(
        module.multiply.py_func
    ).ctypes
    return compiled


def pack(values: torch.Tensor, pair: int) -> torch.Tensor:
    """`[depth, 16 * vectors]` as vectors of 16 lanes, `pair` depth steps side by side.

    A depth step that completes the last pair is NaN: it must not be used.
    """
    depth, columns = values.shape
    padded = torch.full((depth + -depth % pair, columns), torch.nan)
    padded[:depth] = values.float()
    padded = padded.to(values.dtype)
    parts = padded.view(-1, pair, columns // 16, 16)
    return parts.permute(2, 0, 3, 1).contiguous()


@pytest.mark.parametrize("avx512", [True, False])
def test_product(avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_matmul(avx512, monkeypatch)
    multiply = compile_multiply(module)
    torch.manual_seed(0)
    spare = torch.empty(8 * module.COPIED_VECTORS * (max(DEPTHS) + 1))
    for kind, dtype in enumerate(DTYPES):
        pair = pair_size(dtype)
        factor = module.E4M3_FACTOR if dtype == torch.float8_e4m3fn else 1.0
        for rows in range(1, 20):
            for vectors in range(1, 8):
                for depth in DEPTHS:
                    a = torch.randn(rows, depth + depth % 2)
                    b = torch.randn(depth, 16 * vectors).to(dtype)
                    c = torch.randn(rows, 16 * vectors)
                    packed = pack(b, pair)
                    product = a[:, :depth].double() @ (b.double() / factor)
                    for keep in (0, 1):
                        expected = product + c.double() * keep
                        multiply(
                            kind,
                            a.data_ptr(),
                            4 * a.stride(0),
                            packed.data_ptr(),
                            packed.stride(1) * packed.element_size(),
                            packed.stride(0) * packed.element_size(),
                            c.data_ptr(),
                            4 * c.stride(0),
                            rows,
                            vectors,
                            depth,
                            keep,
                            spare.data_ptr(),
                            packed.data_ptr(),  # read next, as far as it is told
                            packed.stride(0) * packed.element_size(),
                        )
                        torch.testing.assert_close(
                            c.double(), expected, atol=2e-5, rtol=1e-5
                        )
