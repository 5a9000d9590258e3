# SPDX-License-Identifier: Apache-2.0
"""Figures that the StreamingLLM paper published, of its own models, as context.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024
(arXiv 2309.17453).
"""

from __future__ import annotations

from sink_paged.evaluation.report import Table

SOURCE = "Xiao et al., ICLR 2024, arXiv 2309.17453"

SINK_COUNTS = Table(
    f"Other models, published ({SOURCE}, Table 2): perplexity on PG19",
    ["model", "cache", "0 sinks", "1", "2", "4", "8"],
    [
        ["Falcon-7B", "2,048", 17.90, 12.12, 12.12, 12.12, 12.12],
        ["MPT-7B", "2,048", 460.29, 14.99, 15.00, 14.99, 14.98],
        ["Pythia-12B", "2,048", 21.62, 11.95, 12.09, 12.09, 12.02],
        ["Llama-2-7B", "4,096", 3359.95, 11.88, 10.51, 9.59, 9.54],
    ],
)

SINK_TOKEN = Table(
    f"Other models, published ({SOURCE}, Table 3): perplexity, 160M parameters",
    ["trained", "0+1024", "1+1023", "2+1022", "4+1020"],
    [
        ["vanilla", 27.87, 18.49, 18.05, 18.05],
        ["with a zero sink", 29214.0, 19.90, 18.27, 18.01],
        ["with a learnable sink token", 1235.0, 18.01, 18.01, 18.02],
    ],
)
