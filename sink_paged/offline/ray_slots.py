# SPDX-License-Identifier: Apache-2.0
"""How many engines a Ray cluster takes, and what each is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import chain, count
from typing import NamedTuple

from sink_paged.offline.progress import report
from sink_paged.offline.results import UnusableError


class Slots(NamedTuple):
    """Places for engines.

    Attributes:
        workers: engines in all.
        cpus: cores of each, which is also its number of threads on CPU.
        gpus: GPUs of each.
        per_node: the most engines on one node.
    """

    workers: int
    cpus: float
    gpus: int
    per_node: int


def plan(nodes: Iterable[Mapping[str, float]], workers: int | None, gpus: int) -> Slots:
    """Divide a cluster among engines.

    With GPUs, an engine gets ``gpus`` of them, by default each that is there. Without,
    there is one engine a node by default, and the cores are divided evenly.

    Args:
        nodes: Ray's resources of each node.
        workers: engines in all, or None for as many as fit.
        gpus: GPUs that an engine needs.

    Raises:
        UnusableError: there is no place for a single engine.
    """
    nodes = list(nodes)
    if any(node.get("GPU") for node in nodes):
        fit = [int(node.get("GPU", 0) // gpus) for node in nodes]
        if not sum(fit):
            raise UnusableError(f"no node of the Ray cluster has {gpus} GPUs")
        if workers is not None and workers > sum(fit):
            report(f"{sum(fit)} of {workers} workers fit; the others wait for nodes")
        return Slots(workers or sum(fit), 1, gpus, max(fit))
    cores = [int(node.get("CPU", 0)) for node in nodes]
    cores = [number for number in cores if number]
    if not cores:
        raise UnusableError("no node of the Ray cluster has a CPU")
    workers = workers or len(cores)
    share = _largest_share(cores, workers)
    return Slots(workers, float(share), 0, max(int(n // share) for n in cores))


def _largest_share(cores: Sequence[int], workers: int) -> Fraction:
    """The most cores that each of ``workers`` can have, a fraction only below one."""
    whole = (Fraction(n) for n in range(max(cores), 0, -1))
    shares = chain(whole, (Fraction(1, n) for n in count(2)))
    return next(
        Fraction(share) for share in shares if sum(n // share for n in cores) >= workers
    )
