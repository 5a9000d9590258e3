# SPDX-License-Identifier: Apache-2.0
"""OpenVINO GenAI's continuous batching with full attention."""

from __future__ import annotations

from streams.peers import openvino
from streams.report import Report
from streams.result import Result
from streams.workload import Workload


def run(workload: Workload, report: Report) -> Result:
    """Measure one run."""
    return openvino.run(workload, report, evict=False)
