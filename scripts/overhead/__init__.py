# SPDX-License-Identifier: Apache-2.0
"""The parts of ``bench_overhead.py``, of which ``bench_endless.py`` uses some.

``engines`` runs engines in processes of their own that step in turns, with ``settings``
they share; ``compared`` says how the steps of two of them compare.
"""
