# SPDX-License-Identifier: Apache-2.0
"""Streams of a vLLM engine that write until their texts are as long as asked for."""

from __future__ import annotations

from streams.engine import Engine
from streams.report import Report
from streams.result import Recorder, Result
from streams.workload import Workload


def write_streams(
    engine: Engine, workload: Workload, report: Report, output_tokens: int
) -> Result:
    """Measure one run.

    Args:
        engine: started, and stopped by the caller.
        workload: what to do.
        report: where progress goes.
        output_tokens: tokens that the engine's context allows each stream to write;
            below the workload's, the streams count as not completed.
    """
    report.phase("warming up")
    engine.warm_up()
    report.phase("writing", workload.streams * output_tokens)
    prompts = workload.prompts()
    recorder = Recorder(workload.streams, workload.prompt_tokens, report.tokens)
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, output_tokens)
    while engine.busy:
        for delta in engine.step():
            recorder.wrote(int(delta.name), len(delta.tokens), delta.moment)
    return recorder.result(workload.output_tokens, **engine.figures())
