# SPDX-License-Identifier: Apache-2.0
"""An engine whose workers vLLM runs on Ray (``distributed_executor_backend=ray``).

vLLM's CPU platform names no Ray resource for its device, which is all that keeps it off
Ray; the tests name one for it, in this process and in Ray's workers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from tests.engines import (
    GOLDEN,
    SHARED_NUMA_NODE,
    core,
    engine,
    generate,
    greedy,
    prompt_losses,
    worst,
)

LOSS_TOLERANCE = 1e-3

pytestmark = pytest.mark.slow


def name_device() -> None:
    """Let a worker know its device by the name of a GPU, as Ray's resources have it."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv(*SHARED_NUMA_NODE)
        ray.init(
            "local",
            num_cpus=2,
            num_gpus=3,  # vLLM gives back what an engine had when the job ends
            include_dashboard=False,
            object_store_memory=2**28,
            runtime_env={
                "worker_process_setup_hook": name_device,
                # Where Ray's workers find this module.
                "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            },
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.mark.usefixtures("cluster")
def test_the_cpu_platform_names_no_ray_device() -> None:
    """When this fails, vLLM runs CPU workers on Ray, and ``name_device`` can go."""
    assert CpuPlatform.ray_device_key == ""
    with (
        pytest.raises(ValueError, match="current platform cpu does not support ray"),
        engine(GOLDEN, (4, 60), distributed_executor_backend="ray"),
    ):
        pass


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_losses_of_the_2023_code(
    workers: int, golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuPlatform, "ray_device_key", "GPU")
    with engine(
        GOLDEN,
        (4, 60),
        distributed_executor_backend="ray",
        tensor_parallel_size=workers,
    ) as llm:
        executor = core(llm).model_executor
        assert isinstance(executor, RayExecutorV2)
        assert len(executor.ray_worker_handles) == workers
        output = generate(llm, [golden["ids"]], greedy(1, prompt_logprobs=0))[0]
        reference = golden["res"]["4+60"]["nll"]
        assert worst(prompt_losses(output), reference) < LOSS_TOLERANCE
