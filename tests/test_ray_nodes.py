# SPDX-License-Identifier: Apache-2.0
"""``offline_batch.py --ray-address``: a cluster of two nodes, of which one is lost.

The nodes are Ray's own, of a machine each as far as Ray knows; engines are fake.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from sink_paged.offline import Request, Result
from sink_paged.offline.ray_data import OBJECT_STORE_BYTES
from tests.test_offline_batch import FakeEngine, batch, records
from tests.test_ray import RAY_ENVIRONMENT, Job, fragile, wait_until  # noqa: F401

LINES = 24


class NodeEngine(FakeEngine):
    """A fake engine that says where it runs; on the node to be lost it is stuck."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.log = folder / "submitted"
        self.node = ray.get_runtime_context().get_node_id()
        self.stuck = (folder / "lost").read_text() == self.node
        self.deadline = time.monotonic() + 300

    def submit(self, request: Request) -> None:
        with self.log.open("a") as file:
            file.write(f"{self.node} {request.id}\n")
        super().submit(request)

    def step(self) -> list[Result]:
        if self.stuck and time.monotonic() < self.deadline:
            time.sleep(0.05)
            return []
        return super().step()


def start_on_node(
    settings: dict[str, Any], sampling: dict[str, Any], share: int = 1
) -> NodeEngine:
    return NodeEngine(Path(settings["model"]))


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head and another node, a core each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        size = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES // 4}
        cluster = Cluster(initialize_head=True, head_node_args=size)
        try:
            cluster.add_node(**size)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def by_node(log: Path) -> dict[str, set[str]]:
    """Lines that each node was given."""
    given: dict[str, set[str]] = defaultdict(set)
    for line in log.read_text().splitlines() if log.exists() else ():
        node, name = line.split()
        given[node].add(name)
    return given


@pytest.mark.slow
@pytest.mark.usefixtures("fragile")
def test_the_lines_of_a_lost_node_are_run_by_the_other(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine a node by default; one node vanishes with lines it was given."""
    monkeypatch.setattr(batch, "start_vllm", start_on_node)
    lost = next(iter(nodes.worker_nodes))
    job = Job(
        tmp_path, [{"id": f"n{n}", "prompt": "a" * (n + 1)} for n in range(LINES)]
    )
    (tmp_path / "lost").write_text(lost.node_id)
    log = tmp_path / "submitted"
    held: set[str] = set()

    def lose_it() -> None:
        wait_until(lambda: len(by_node(log)) == 2 and bool(records(job.out)))
        held.update(by_node(log)[lost.node_id])
        nodes.remove_node(lost, allow_graceful=False)

    thread = Thread(target=lose_it)
    thread.start()
    status = job.run("--ray", "--ray-address", nodes.address, "--batch-size", "4")
    thread.join()
    assert status == 0
    assert sorted(r["id"] for r in records(job.out)) == sorted(
        f"n{n}" for n in range(LINES)
    )
    given = by_node(log)
    assert len(given) == 2
    (other,) = given.keys() - {lost.node_id}
    assert held
    assert held <= given[lost.node_id] <= given[other]
    assert given[other] == {f"n{n}" for n in range(LINES)}
