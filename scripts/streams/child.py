# SPDX-License-Identifier: Apache-2.0
"""Runs one workload: ``python -m streams.child DESCRIPTOR WORKLOAD``."""

from __future__ import annotations

import importlib
import sys
import traceback

from streams.report import Report, SkippedError
from streams.workload import Workload


def main() -> None:
    """Measure; say on the descriptor what came of it, all else goes to the log."""
    report = Report(int(sys.argv[1]))
    workload = Workload.from_json(sys.argv[2])
    report.phase("starting")
    try:
        peer = importlib.import_module(f"streams.peers.{workload.peer}")
        report.send(result=peer.run(workload, report).to_json())
    except SkippedError as reason:
        report.send(skipped=str(reason), everywhere=reason.everywhere)
    except Exception as error:
        traceback.print_exc()
        report.send(failed=f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
