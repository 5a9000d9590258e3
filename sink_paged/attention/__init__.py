# SPDX-License-Identifier: Apache-2.0
"""Attention with sinks and a window: vLLM backend, kernels and their oracle."""
