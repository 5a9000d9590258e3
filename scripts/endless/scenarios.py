# SPDX-License-Identifier: Apache-2.0
"""Streams that write alone, side by side, beside short requests, beside a new one."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from load.report import progress
from overhead.compared import compare
from overhead.engines import command, engines, in_turns
from overhead.settings import SETTLING_STEPS, UNTIMED_STEPS, Settings

from endless.engine import CHUNK, Engine
from endless.series import Recorder, Series

BEGINNING = 64
"""Tokens of the prompt of a stream that writes."""
TENTHS = 10
PAIRED_BLOCKS, PAIRED_STEPS = 32, 64
SHORT_PROMPT, SHORT_OUTPUT, SHORT_AT_ONCE = 96, 32, 3


def run_streams(
    engine: Engine, prompts: list[list[int]], max_tokens: int, name: str
) -> tuple[Series, list[list[int]]]:
    """Let streams write side by side; what was seen, and what they wrote."""
    outputs: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        outputs[str(index)] = []
        engine.add(str(index), prompt, max_tokens)
    length = len(prompts[0])
    text, recorder = 0, Recorder(engine)
    with progress(length + max_tokens, name, "tok") as bar:
        while engine.busy:
            for delta in engine.step():
                outputs[delta.name] += delta.tokens
            before = text
            text = (
                length + len(outputs["0"])
                if outputs["0"]
                else min(length, text + CHUNK // len(prompts))
            )
            recorder.after_step(text, timed=max_tokens > 1 or text < length)
            bar.update(text - before)
    return recorder.series, [outputs[str(index)] for index in range(len(prompts))]


def run_mixed(
    engine: Engine, prompt: list[int], max_tokens: int, alone: list[int], vocab: int
) -> tuple[Series, dict[str, Any]]:
    """One stream beside short requests; their latency over its text.

    Args:
        engine: started.
        prompt: of the stream.
        max_tokens: that it writes, unless the engine ends it before.
        alone: what it writes alone.
        vocab: token ids of the model.
    """
    rng = random.Random(1)
    shared = [rng.randrange(vocab) for _ in range(SHORT_PROMPT)]
    kinds = [
        shared[: rng.choice((1, 32, 64, 90))] + [rng.randrange(vocab) for _ in range(6)]
        for _ in range(64)
    ]
    expected = []
    for kind in kinds:
        _, (tokens,) = run_streams(engine, [kind], SHORT_OUTPUT, "")
        expected.append(tokens)

    engine.add("long", prompt, max_tokens)
    long: list[int] = []
    short: dict[str, list[int]] = {}
    begun: dict[str, float] = {}
    latencies: list[tuple[int, float, float]] = []
    firsts: dict[str, float] = {}
    number = wrong = 0
    ended = False
    recorder = Recorder(engine)
    with progress(max_tokens, "mixed", "tok") as bar:
        while not ended:
            while len(short) < SHORT_AT_ONCE and len(long) + 100 < max_tokens:
                name = str(number)
                short[name], begun[name] = [], time.perf_counter()
                engine.add(name, kinds[number % len(kinds)], SHORT_OUTPUT)
                number += 1
            for delta in engine.step():
                name, tokens = delta.name, delta.tokens
                if name == "long":
                    long += tokens
                    ended = delta.finished
                    bar.update(len(tokens))
                    continue
                firsts.setdefault(name, time.perf_counter() - begun[name])
                short[name] += tokens
                if delta.finished:
                    wrong += short.pop(name) != expected[int(name) % len(kinds)]
                    total = time.perf_counter() - begun.pop(name)
                    latencies.append((len(long), firsts.pop(name), total))
            recorder.after_step(len(prompt) + len(long))
    while engine.busy:
        list(engine.step())
    tenth = max(1, len(latencies) // TENTHS)
    same = [a == b for a, b in zip(long, alone, strict=False)]
    return recorder.series, {
        "short_requests": number,
        "short_requests_that_differ": wrong,
        "long_tokens_compared": len(same),
        "long_first_difference": same.index(False) if False in same else None,
        **{
            f"short_{what}_ms_{where}_tenth": 1e3
            * statistics.median(entry[column] for entry in part)
            for column, what in ((1, "first_token"), (2, "latency"))
            for where, part in (
                ("first", latencies[:tenth]),
                ("last", latencies[-tenth:]),
            )
        },
    }


def run_paired(model: str, context: int, max_tokens: int) -> list[dict[str, Any]]:
    """Steps of a stream that grows, over those of a new one, in turns.

    Args:
        model: folder of the model.
        context: resident tokens.
        max_tokens: that the stream writes.

    Returns:
        At the window's end and every tenth of the text: its length, both median steps
        in milliseconds, their ratio and the quartiles of the ratios of the blocks, as
        ``compare`` names them.
    """
    settings = Settings(
        window=context,
        streams=(1,),
        blocks=PAIRED_BLOCKS,
        steps=PAIRED_STEPS,
        kv_gib=1.0,
    )
    marks = []
    with engines({"long": "ours", "young": "ours"}, model, settings) as connections:
        text = BEGINNING + SETTLING_STEPS
        most = 2 * (max_tokens + TENTHS * settings.block_steps)
        command("begin", connections["long"], 1, BEGINNING, most)
        with progress(max_tokens, "paired", "tok") as bar:
            for tenth in range(TENTHS + 1):
                goal = max(2 * context, max_tokens * tenth // TENTHS)
                while text < goal:
                    steps = min(1000, goal - text)
                    command("run", connections["long"], steps)
                    text += steps + UNTIMED_STEPS
                    bar.update(steps)
                most = 2 * settings.block_steps
                command("begin", connections["young"], 1, 2 * context, most)
                times = in_turns(connections, PAIRED_BLOCKS, PAIRED_STEPS)
                command("end", connections["young"])
                text += settings.block_steps
                compared = compare(times["long"], times["young"])
                marks.append({"tokens": text} | compared)
    return marks
