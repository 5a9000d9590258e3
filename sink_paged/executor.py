# SPDX-License-Identifier: Apache-2.0
"""Where the worker of a small CPU machine runs: in the engine core's own process.

vLLM puts a CPU worker into a process of its own, bound to all cores but one; the spare
core waits for the worker's answers by polling. With two cores that is half of the
machine. Here the engine core calls its worker, as it does for a single GPU, and the
worker's threads take every core, unbound: the front end runs where they leave room.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list
from vllm.v1.executor.uniproc_executor import UniProcExecutor

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers only

IN_PROCESS = "sink_paged.executor.InProcessExecutor"
MOST_CORES = 8
"""Above, one core spared is a small loss, and binding the threads a gain."""
CHOICES = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")
"""Environment variables of vLLM that say how the worker's threads are to be placed."""


def num_cores() -> int:
    """Physical cores that this process may use."""
    return len({cpu.physical_core for cpu in get_allowed_cpu_list()})


def choose_executor(engine_args: Any) -> None:
    """Let a single worker on a small CPU machine run in the engine core's process.

    Only where nothing has been said: an executor, parallel workers, a placement of
    threads or an engine without processes stay as they are.
    """
    if (
        not current_platform.is_cpu()
        or engine_args.distributed_executor_backend is not None
        or engine_args.tensor_parallel_size > 1
        or engine_args.pipeline_parallel_size > 1
        or engine_args.data_parallel_size > 1
        or os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "1"
        or any(os.environ.get(name) for name in CHOICES)
        or len({cpu.numa_node for cpu in get_allowed_cpu_list()}) > 1
        or num_cores() > MOST_CORES
    ):
        return
    engine_args.distributed_executor_backend = IN_PROCESS


class InProcessExecutor(UniProcExecutor):
    """Runs the CPU worker in the engine core's process, on all of its cores."""

    def _init_executor(self) -> None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(num_cores())
        logger.info(
            "The worker runs in the engine core's process on %d threads; "
            "VLLM_CPU_OMP_THREADS_BIND=auto gives it a process and bound threads",
            torch.get_num_threads(),
        )
        super()._init_executor()
