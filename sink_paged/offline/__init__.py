# SPDX-License-Identifier: Apache-2.0
"""Runs a file of requests of any length through one vLLM engine, resumably.

Nothing here imports vLLM but ``sink_paged.offline.engine``.
"""

from sink_paged.offline.files import (
    count_lines,
    is_parquet,
    read_lines,
    records_path,
    write_parquet,
)
from sink_paged.offline.lines import Done, Failure, Outcome, Request, Result
from sink_paged.offline.progress import Tally, report
from sink_paged.offline.requests import RequestReader, check_sampling
from sink_paged.offline.results import Output, UnusableError, sort_output
from sink_paged.offline.runner import (
    Engine,
    RefusedError,
    run,
    run_requests,
    start_vllm,
)

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
    "is_parquet",
    "read_lines",
    "records_path",
    "report",
    "run",
    "run_requests",
    "sort_output",
    "start_vllm",
    "write_parquet",
]
