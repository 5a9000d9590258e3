# SPDX-License-Identifier: Apache-2.0
"""The paper's baseline: a sliding window with re-computation, on stock vLLM.

Every token is the answer to a prompt of its own, the last ``window`` tokens of the
text. A stream's next prompt goes in as soon as its token is there, so that prompts of
several streams share steps. A window does not begin as the one before it did: there is
no prefix to cache.

Past the window a token costs the same at any length of the text: the texts begin at
``window`` tokens, and once all streams have a token the run may stop after two more of
each and ``workload.seconds``. What whole texts would take is then estimated.
"""

from __future__ import annotations

from dataclasses import replace

from streams.engine import Engine, Requests, pool_blocks
from streams.report import Report
from streams.result import Recorder, Result
from streams.workload import Workload

LEAST_TOKENS = 3
"""Tokens a stream writes at least: one to begin with and two to time."""


def run(workload: Workload, report: Report) -> Result:
    """Measure one run."""
    window = workload.window
    begin = replace(workload, prompt_tokens=window)
    engine = Engine(
        begin,
        pool_blocks(workload, window + 1),
        max_model_len=window + 1,
        enable_prefix_caching=False,
    )
    try:
        report.phase("warming up")
        engine.warm_up()
        report.phase("writing", workload.streams * workload.output_tokens)
        texts = begin.prompts()
        recorder = Recorder(workload.streams, window, report.tokens)
        recompute(engine, texts, workload, recorder)
        figures = engine.figures()
        # A request of one step has given its blocks back when usage is reported.
        figures["kv_blocks_peak"] = None
        return recorder.result(workload.output_tokens, extrapolate=True, **figures)
    finally:
        engine.close()


def recompute(
    engine: Requests, texts: list[list[int]], workload: Workload, recorder: Recorder
) -> None:
    """Let ``texts`` grow, each token from the last ``window`` tokens alone."""

    def ask(stream: int) -> None:
        name = f"{stream}/{len(texts[stream])}"
        engine.add(name, texts[stream][-workload.window :], 1)

    for stream in range(len(texts)):
        ask(stream)
    while engine.busy:
        for delta in engine.step():
            if not delta.tokens:
                continue
            stream = int(delta.name.partition("/")[0])
            texts[stream] += delta.tokens
            recorder.wrote(stream, moment=delta.moment)
            late = 0 < workload.seconds < recorder.writing_seconds
            least = LEAST_TOKENS if late else workload.output_tokens
            if recorder.written(stream) < least:
                ask(stream)
