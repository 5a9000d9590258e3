# SPDX-License-Identifier: Apache-2.0
"""Where a CPU worker runs, and on how many threads."""

from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from sink_paged import executor
from tests.engines import GOLDEN

SINKS: dict[str, Any] = {"additional_config": {"sink_paged": {}}}


def executor_of(**options: Any) -> type[Executor]:
    """The class that would run the worker."""
    arguments = AsyncEngineArgs(str(GOLDEN), skip_tokenizer_init=True, **options)
    return Executor.get_class(arguments.create_engine_config())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As outside the tests; returns a function that sets (core, NUMA node) pairs."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")

    def set_cpus(*cpus: tuple[int, int]) -> None:
        infos = [LogicalCPUInfo(n, *cpu) for n, cpu in enumerate(cpus)]
        monkeypatch.setattr(executor, "get_allowed_cpu_list", lambda: infos)

    set_cpus((0, 0), (0, 0), (1, 0), (1, 0))
    return set_cpus


def test_a_small_machine_spares_the_worker_a_process(machine: Any) -> None:
    assert executor_of(**SINKS) is executor.InProcessExecutor


def test_stock_engines_keep_their_executor(machine: Any) -> None:
    assert not issubclass(executor_of(), UniProcExecutor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        ("VLLM_CPU_NUM_OF_RESERVED_CPU", "1"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ],
)
def test_what_the_environment_says_is_kept(
    machine: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert executor_of(**SINKS) is not executor.InProcessExecutor


def test_a_named_executor_is_kept(machine: Any) -> None:
    named = executor_of(distributed_executor_backend="mp", **SINKS)
    assert named is not executor.InProcessExecutor


@pytest.mark.parametrize(
    "cpus",
    [
        [(core, 0) for core in range(executor.MOST_CORES + 1)],
        [(0, 0), (1, 1)],
    ],
    ids=["many cores", "two NUMA nodes"],
)
def test_a_large_machine_keeps_its_bound_threads(
    machine: Any, cpus: list[tuple[int, int]]
) -> None:
    machine(*cpus)
    assert executor_of(**SINKS) is not executor.InProcessExecutor


@pytest.mark.parametrize(("variable", "threads"), [(None, 2), ("1", None)])
def test_threads_are_the_cores_unless_the_environment_says(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    threads: int | None,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(UniProcExecutor, "_init_executor", lambda self: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    instance = executor.InProcessExecutor.__new__(executor.InProcessExecutor)
    instance._init_executor()
    assert asked == ([] if threads is None else [threads])
