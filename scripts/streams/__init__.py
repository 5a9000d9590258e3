# SPDX-License-Identifier: Apache-2.0
"""The parts of ``bench_streams.py``: workloads, peers, measurements, tables, plots.

A *workload* is one measurement: so many streams of one peer. It runs in a process of
its own (``child``), which reports to the script (``launch``). Only the peers import an
engine, so that one may live in another Python environment.
"""
