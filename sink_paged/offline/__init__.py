# SPDX-License-Identifier: Apache-2.0
"""Runs a file of requests of any length through one vLLM engine, resumably.

Nothing here imports vLLM but ``sink_paged.offline.engine``.
"""

from sink_paged.offline.lines import Done, Failure, Outcome, Request, Result
from sink_paged.offline.progress import Tally, report
from sink_paged.offline.requests import RequestReader, check_sampling, count_lines
from sink_paged.offline.results import Output, UnusableError, sort_output
from sink_paged.offline.runner import Engine, RefusedError, run, run_requests

__all__ = [
    "Done",
    "Engine",
    "Failure",
    "Outcome",
    "Output",
    "RefusedError",
    "Request",
    "RequestReader",
    "Result",
    "Tally",
    "UnusableError",
    "check_sampling",
    "count_lines",
    "report",
    "run",
    "run_requests",
    "sort_output",
]
