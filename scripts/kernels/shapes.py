# SPDX-License-Identifier: Apache-2.0
"""Heads of models."""

SHAPES = {
    "32q/8kv x128": (32, 8, 128),
    "8/8 x64": (8, 8, 64),
    "32/32 x128": (32, 32, 128),
    "71/1 x64": (71, 1, 64),
}
"""Heads, heads of keys, their size."""
