# SPDX-License-Identifier: Apache-2.0
"""The parts of ``load_test.py``.

``workload`` says what clients ask for, ``bad_requests`` what they ask for in vain,
``clients`` sends both; ``server`` runs ``vllm serve`` and reads its metrics, ``memory``
samples and judges its growth; ``exactness`` compares answers with undisturbed ones,
``faults`` kills processes under load; ``report`` prints and plots.
"""
