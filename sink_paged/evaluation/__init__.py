# SPDX-License-Identifier: Apache-2.0
"""Does a model keep its quality? The evaluations of StreamingLLM, on vLLM's engine.

- ``configs``: what is compared, by the names of the paper's tables.
- ``scoring``: losses of a text's tokens by an engine of such a config.
- ``stream_eval``: the question-answering stream and its distance sweep.
- ``attention_maps``: average attention logits, the share of the first tokens.
- ``report``: tables, plots, and the file that a run leaves.

The scripts in ``scripts/`` are their command lines.
"""
