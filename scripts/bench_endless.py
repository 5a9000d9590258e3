# SPDX-License-Identifier: Apache-2.0
"""What a stream without an end costs: step time, memory and KV blocks over its text.

Runs vLLM with sink eviction, its front end (this process), engine core and worker each
in a process of its own, through these scenarios:

- ``prefill``: one prompt of millions of tokens, read in chunks;
- ``decode``: one stream that writes hundreds of thousands of tokens;
- ``side-by-side``: many streams that write at once;
- ``mixed``: one stream that writes beside short requests that come and go, which share
  beginnings in the prefix cache; its tokens and theirs are compared with those alone,
  which are those of ``decode`` or, without it, are written before;
- ``paired``: two engines as ``bench_overhead.py`` starts them, one with a stream that
  writes on and on, the other at every tenth of its text with a new one just past the
  window. Both step in turns, so that noise and drift of the machine fall on both; a
  ratio of their steps that stays is a step time that does not grow.

For each it reports the median step time in every tenth of the text (of what lies past
the window), the resident set size of each process against the text, fitted by a line,
and the KV blocks held. Step times are those the front end sees: from one message of the
engine core to the next.

The floor of the growth is what vLLM's own bookkeeping keeps of a request, in CPython:
the engine core two list entries a token (16 bytes), the front end one (8 bytes), either
an integer as well (32 bytes, none for the 262 smallest), and with prefix caching a hash
a block (73 bytes). ``--stock`` measures it on stock vLLM, whose context bounds the
texts. The worker needs nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import bench_overhead
import numpy as np
import psutil
from load.report import progress
from load.server import role_of
from provenance import provenance
from streams.engine import Requests
from streams.random_llama import write_random_llama
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

SINK_TOKENS = 4
SCENARIOS = {
    "prefill": "prefill_tokens",
    "decode": "decode_tokens",
    "side-by-side": "stream_tokens",
    "mixed": "mixed_tokens",
    "paired": "decode_tokens",
}
"""And the argument that says how many tokens each reads (``prefill``) or writes."""
LENGTHS = {
    "prefill_tokens": 4_000_000,
    "decode_tokens": 300_000,
    "stream_tokens": 8_000,
    "mixed_tokens": 200_000,
}
"""Defaults of these arguments."""
BEGINNING = 64
"""Tokens of the prompt of a stream that writes."""
TENTHS = 10
CHUNK = 2048
MEMORY_SECONDS = 0.5
PAIRED_BLOCKS, PAIRED_STEPS = 32, 64
SHORT_PROMPT, SHORT_OUTPUT, SHORT_AT_ONCE = 96, 32, 3
SHAPE_7M = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""Of the random model; most of its token ids are above 256."""


class BlockUsage(StatLoggerBase):
    """Keeps the last ``kv_cache_usage`` that the scheduler reported."""

    last = 0.0

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """See ``StatLoggerBase``."""

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Take over the step's figure."""
        if scheduler_stats is not None:
            BlockUsage.last = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


@dataclass
class Series:
    """What was seen while the text grew.

    Attributes:
        tokens: text length after each step, of one stream.
        seconds: duration of each step.
        memory: per process, bytes resident at ``memory_tokens``.
        blocks: KV blocks held at ``memory_tokens``.
    """

    tokens: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    memory_tokens: array[float] = field(default_factory=lambda: array("d"))
    memory: dict[str, array[float]] = field(default_factory=dict)
    blocks: array[float] = field(default_factory=lambda: array("d"))


class Engine(Requests):
    """vLLM in three processes, stepped from here; texts are detokenized, as served."""

    def __init__(self, model: str, window: int, streams: int, stock: int) -> None:
        """Start it; ``stock`` is the context length of a stock engine, or 0."""
        options: dict[str, Any] = {}
        if stock:
            options["hf_overrides"] = {"max_position_embeddings": stock}
        else:
            settings = {"sink_tokens": SINK_TOKENS, "window_tokens": window}
            options["additional_config"] = {"sink_paged": settings}
        self.has_tokenizer = Path(model, "tokenizer.json").exists()
        arguments = EngineArgs(
            model,
            skip_tokenizer_init=not self.has_tokenizer,
            dtype="float32",
            block_size=32,
            max_num_seqs=max(streams, SHORT_AT_ONCE + 1),
            max_num_batched_tokens=CHUNK,
            kv_cache_memory_bytes=1 << 30,
            distributed_executor_backend="mp",
            **options,
        )
        super().__init__(
            LLMEngine.from_engine_args(
                arguments, stat_loggers=[BlockUsage], enable_multiprocessing=True
            )
        )
        cache = self.engine.vllm_config.cache_config
        self.num_blocks = int(cache.num_gpu_blocks)
        front_end = psutil.Process()
        children = front_end.children(recursive=True)
        self.processes = {"front end": front_end}
        for child in children:
            if (role := role_of(child)) != "other":
                self.processes[role] = child

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        """Add a greedy request that has no end but its length."""
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=self.has_tokenizer,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def memory(self) -> dict[str, int]:
        """Bytes resident, by process."""
        return {role: p.memory_info().rss for role, p in self.processes.items()}

    def blocks(self) -> float:
        """KV blocks held."""
        return BlockUsage.last * (self.num_blocks - 1)

    def close(self) -> None:
        """Stop its processes."""
        self.engine.engine_core.shutdown()


class Recorder:
    """Fills a ``Series`` while an engine is stepped."""

    def __init__(self, engine: Engine) -> None:
        """Start the clock."""
        self.engine = engine
        self.series = Series(memory={role: array("d") for role in engine.processes})
        self._sampled, self._last = 0.0, time.perf_counter()

    def after_step(self, text: int, timed: bool = True) -> None:
        """Note a step and now and then the memory; ``text`` is the text's length."""
        now, series = time.perf_counter(), self.series
        if timed:
            series.tokens.append(text)
            series.seconds.append(now - self._last)
        if now - self._sampled > MEMORY_SECONDS:
            self._sampled = now
            for role, resident in self.engine.memory().items():
                series.memory[role].append(resident)
            series.memory_tokens.append(text)
            series.blocks.append(self.engine.blocks())
        self._last = time.perf_counter()


@contextmanager
def started(*args: Any) -> Iterator[Engine]:
    """An engine, stopped at the end."""
    engine = Engine(*args)
    try:
        yield engine
    finally:
        engine.close()


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
        ``bench_overhead.compare`` names them.
    """
    args = argparse.Namespace(
        model=model,
        window=context,
        streams=[1],
        blocks=PAIRED_BLOCKS,
        steps=PAIRED_STEPS,
        dtype="float32",
        eager=False,
        profile_steps=0,
        kv_gib=1.0,
    )
    command = bench_overhead.command
    marks = []
    names = {"long": "ours", "young": "ours"}
    with bench_overhead.engines(names, model, args) as engines:
        text = BEGINNING + bench_overhead.SETTLING_STEPS
        compared_steps = bench_overhead.block_steps(args)
        most = 2 * (max_tokens + TENTHS * compared_steps)
        command("begin", engines["long"], 1, BEGINNING, most)
        with progress(max_tokens, "paired", "tok") as bar:
            for tenth in range(TENTHS + 1):
                goal = max(2 * context, max_tokens * tenth // TENTHS)
                while text < goal:
                    steps = min(1000, goal - text)
                    command("run", engines["long"], steps)
                    text += steps + bench_overhead.UNTIMED_STEPS
                    bar.update(steps)
                most = 2 * compared_steps
                command("begin", engines["young"], 1, 2 * context, most)
                times = bench_overhead.in_turns(engines, args.blocks, args.steps)
                command("end", engines["young"])
                text += compared_steps
                compared = bench_overhead.compare(times["long"], times["young"])
                marks.append({"tokens": text} | compared)
    return marks


def summarise(series: Series, filled: int) -> dict[str, Any]:
    """Step time by tenths, growth of memory, blocks; past ``filled`` tokens of text."""
    tokens, seconds = np.array(series.tokens), np.array(series.seconds)
    steady = seconds[tokens > filled]
    tenths = [1e3 * float(np.median(part)) for part in np.array_split(steady, TENTHS)]
    memory_tokens = np.array(series.memory_tokens)
    past = memory_tokens > filled
    growth = {}
    for role, resident in series.memory.items():
        if past.sum() > 2 and np.ptp(memory_tokens[past]):
            slope, _ = np.polyfit(memory_tokens[past], np.array(resident)[past], 1)
            growth[role] = float(slope)
    blocks = np.array(series.blocks)[past]
    return {
        "steps": len(steady),
        "step_ms_tenths": tenths,
        "step_ms_p10_p90": [1e3 * float(x) for x in np.percentile(steady, (10, 90))],
        "last_over_first": tenths[-1] / tenths[0],
        "bytes_per_token": growth,
        "peak_mib": {role: max(r) / 2**20 for role, r in series.memory.items() if r},
        "kv_blocks_min_max": [float(blocks.min()), float(blocks.max())]
        if blocks.size
        else None,
    }


def thin(series: Series, points: int = 400) -> dict[str, list[float]]:
    """Medians of the step time and samples of memory, few enough for a file."""
    parts = np.array_split(np.arange(len(series.tokens)), points)
    tokens, seconds = np.array(series.tokens), np.array(series.seconds)
    keep = np.unique(np.linspace(0, len(series.memory_tokens) - 1, points).astype(int))
    return {
        "tokens": [float(tokens[part[-1]]) for part in parts if part.size],
        "step_ms": [1e3 * float(np.median(seconds[p])) for p in parts if p.size],
        "memory_tokens": [series.memory_tokens[i] for i in keep],
        "kv_blocks": [series.blocks[i] for i in keep],
        **{
            f"{role}_mib": [resident[i] / 2**20 for i in keep]
            for role, resident in series.memory.items()
        },
    }


def run_model(
    model: str, vocab: int, args: argparse.Namespace, save: Callable[[Any], None]
) -> None:
    """All scenarios of a model; ``save`` is called with the results so far."""
    context = json.loads(Path(model, "config.json").read_text())
    window = context["max_position_embeddings"] - SINK_TOKENS - 1
    filled = context["max_position_embeddings"] + CHUNK
    for scenario in args.scenarios:
        option = SCENARIOS[scenario]
        least = filled + TENTHS * (CHUNK if scenario == "prefill" else 1)
        if getattr(args, option) <= least:
            needed = f"{flag(option)} must be above {least}"
            if args.stock:
                needed += f", --stock above {least + BEGINNING}"
            raise SystemExit(f"{needed}: what is measured is the text past the window")
    rng = np.random.default_rng(0)
    beginning = rng.integers(vocab, size=BEGINNING).tolist()
    results: dict[str, Any] = {}

    def keep(name: str, summary: dict[str, Any], series: dict[str, Any]) -> None:
        results[name] = {"summary": summary, "series": series}
        save({"cache_config": [SINK_TOKENS, window], "scenarios": results})
        print(f"\n{name}: {json.dumps(summary, indent=1)}", flush=True)

    def report(name: str, series: Series, more: dict[str, Any] | None = None) -> None:
        keep(name, summarise(series, filled) | (more or {}), thin(series))

    wanted = args.scenarios
    if "paired" in wanted:
        context = window + SINK_TOKENS + 1
        marks = run_paired(model, context, args.decode_tokens)
        summary = {
            "long_over_young": [mark["ratio"] for mark in marks],
            "quartiles": [mark["ratio_quartiles"] for mark in marks],
            "last_over_first": marks[-1]["ratio"] / marks[0]["ratio"],
        }
        columns = {"tokens": "tokens", "step_ms": "ours_ms", "young_ms": "stock_ms"}
        keep(
            "paired",
            summary,
            {name: [mark[key] for mark in marks] for name, key in columns.items()},
        )
    if wanted == ["paired"]:
        return
    with started(model, window, args.streams, args.stock) as engine:
        if "prefill" in wanted:
            prompt = rng.integers(vocab, size=args.prefill_tokens).tolist()
            series, _ = run_streams(engine, [prompt], 1, "prefill")
            report("prefill", series)
        alone: list[int] = []
        if "decode" in wanted:
            series, (alone,) = run_streams(
                engine, [beginning], args.decode_tokens, "decode"
            )
            report("decode", series)
        if "side-by-side" in wanted:
            prompts = [
                rng.integers(vocab, size=BEGINNING).tolist()
                for _ in range(args.streams)
            ]
            series, _ = run_streams(engine, prompts, args.stream_tokens, "side-by-side")
            report("side-by-side", series)
        if "mixed" in wanted:
            if not alone:
                _, (alone,) = run_streams(
                    engine, [beginning], args.mixed_tokens, "alone"
                )
            series, more = run_mixed(engine, beginning, args.mixed_tokens, alone, vocab)
            report("mixed", series, more)


def plot(models: dict[str, Any], path: Path) -> None:
    """Step time, memory and blocks over the text, a row for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(models), 3, figsize=(13, 3.6 * len(models)), squeeze=False
    )
    for axes, (model, result) in zip(rows, models.items(), strict=True):
        for index, (name, scenario) in enumerate(result["scenarios"].items()):
            series, color = scenario["series"], f"C{index}"
            axes[0].plot(series["tokens"], series["step_ms"], color, label=name)
            if "young_ms" in series:
                new = "a new stream beside it"
                axes[0].plot(
                    series["tokens"], series["young_ms"], f"{color}:", label=new
                )
            for role, style in (
                ("worker", "-"),
                ("engine core", "--"),
                ("front end", ":"),
            ):
                if f"{role}_mib" in series:
                    resident = np.array(series[f"{role}_mib"])
                    axes[1].plot(series["memory_tokens"], resident, color + style)
            if "kv_blocks" in series:
                axes[2].plot(series["memory_tokens"], series["kv_blocks"], color)
        titles = (
            "step, ms",
            "resident, MiB (-- engine core, : front end)",
            "KV blocks",
        )
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(f"{model}: {title}", fontsize=9)
            axis.set_xscale("log")
            axis.set_xlabel("text, tokens")
            axis.set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; stock vLLM's context bounds the lengths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        action="append",
        help="a folder, or 'random' for random weights; default both of ours",
    )
    for option, length in LENGTHS.items():
        parser.add_argument(flag(option), type=int, help=f"({length:,})")
    parser.add_argument("--streams", type=int, default=32, help="side by side (32)")
    parser.add_argument(
        "--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS)
    )
    parser.add_argument(
        "--stock",
        type=int,
        default=0,
        metavar="TOKENS",
        help="stock vLLM of this context length instead, which bounds the lengths",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("bench_out"))
    args = parser.parse_args(arguments)
    if args.stock:  # it compares streams
        args.scenarios = [name for name in args.scenarios if name != "paired"]
    if not args.scenarios:
        parser.error("--stock runs every scenario but paired")
    for option, length in LENGTHS.items():
        given = getattr(args, option)
        if args.stock:
            # It insists to write a token after a prompt.
            most = args.stock - (1 if option == "prefill_tokens" else BEGINNING)
            if given is not None and given > most:
                parser.error(
                    f"{flag(option)} must be at most {most} with --stock {args.stock}"
                )
            length = min(length, most)
        setattr(args, option, length if given is None else given)
    return args


def flag(option: str) -> str:
    """How the command line names an argument."""
    return f"--{option.replace('_', '-')}"


def main() -> None:
    """Run and print; write ``endless.json`` and ``endless.png`` as results come."""
    args = parse_arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    models: dict[str, Any] = {}
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def save(model: str, result: dict[str, Any]) -> None:
        models[model] = result
        document = {"provenance": provenance(), "models": models}
        path = args.output_dir / "endless.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        plot(models, args.output_dir / "endless.png")

    with tempfile.TemporaryDirectory() as folder:
        for model in args.model or ["models/pocket", "random"]:
            path, vocab = model, 256
            if model == "random":
                path, vocab = folder, SHAPE_7M["vocab_size"]
                write_random_llama(Path(path), 1024, **SHAPE_7M)
            run_model(path, vocab, args, functools.partial(save, model))


if __name__ == "__main__":
    main()
