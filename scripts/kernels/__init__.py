# SPDX-License-Identifier: Apache-2.0
"""The parts of ``bench_attention.py``; ``bench_attention_cuda.py`` shares ``shapes``.

``cases`` says what is measured, ``calls`` are the kernels on it, ``rates`` the time of
a call and the least that it could be.
"""
