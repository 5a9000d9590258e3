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
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
from endless.engine import CHUNK, Engine
from endless.figures import plot, summarise, thin
from endless.scenarios import (
    BEGINNING,
    SHORT_AT_ONCE,
    TENTHS,
    run_mixed,
    run_paired,
    run_streams,
)
from endless.series import Series
from overhead.settings import SINK_TOKENS
from provenance import provenance
from streams.random_llama import write_random_llama

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
    most = max(args.streams, SHORT_AT_ONCE + 1)
    with closing(Engine(model, window, most, args.stock)) as engine:
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
