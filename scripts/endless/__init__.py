# SPDX-License-Identifier: Apache-2.0
"""The parts of ``bench_endless.py``.

``scenarios`` run an ``engine`` and record a ``series`` of what they see, which
``figures`` sums up and plots.
"""
