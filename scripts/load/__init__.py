# SPDX-License-Identifier: Apache-2.0
"""The parts of ``load_test.py``.

``workload`` says what clients ask for, ``bad_requests`` what they ask for in vain,
``clients`` sends both, ``streaming`` reads an answer from its ``events``. ``server``
runs ``vllm serve``, ``watch`` observes it, ``memory`` judges its growth. ``exactness``
compares answers with undisturbed ones, ``faults`` kills processes under load. What
failed is kept by ``checks``. ``figures`` are those of ``vllm bench serve``; ``report``
prints and plots.
"""
