# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: engines in this process, nothing asked of a network."""

import os
from pathlib import Path

import pytest

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several processes on the same cores would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton kernels run in Triton's interpreter. A process chooses it when
# it imports Triton, which vLLM does; with TRITON_INTERPRET=0 they run on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# It would override what the tests give their KV caches.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model."""
    from tests.engines import make_llama  # imports vLLM, which reads what is set above

    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder)
    return folder
