# SPDX-License-Identifier: Apache-2.0
"""Does a model keep its quality? The evaluations of StreamingLLM, on vLLM's engine.

- ``configs``: what is compared, by the names of the paper's tables.
- ``texts``: what is read, as one stream of tokens.
- ``scoring``: losses of a text's tokens by an engine of such a config.
- ``stream_eval``, ``stream_answers``, ``stream_results``: the question-answering stream
  and its distance sweep.
- ``attention_observer``, ``attention_maps``, ``attention_results``: average attention
  logits, the share of the first tokens.
- ``report``: tables, plots, and the file that a run leaves; ``paper``: its figures.

The scripts in ``scripts/`` are their command lines.
"""
