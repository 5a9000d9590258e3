# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM for vLLM: attention sinks on batched, paged, continuous serving."""

from sink_paged.config import SinkConfig
from sink_paged.window import BlockWindow, SinkWindow

__all__ = ["BlockWindow", "SinkConfig", "SinkWindow"]
__version__ = "0.1.0"
