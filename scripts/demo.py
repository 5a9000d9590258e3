#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Show on a small model what sink eviction does, and what happens without it.

One text, many times longer than the model's trained context, is read three ways: by
vLLM with sink eviction, by stock vLLM up to where it must stop, and by the same model
run densely past its context. The mean loss of each stretch of the text is printed, in
nats per token; the bundled model has one token per byte and never saw the text. Then
the stream goes on where the text ends.

    make demo
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 2048  # tokens that vLLM prefills in one step
TAIL_LINES = 4  # of the text that are shown before the continuation
BLOCK = 32  # tokens of a KV block: the smallest that vLLM's CPU kernels like


@dataclass
class Reading:
    """What one way of reading the text gave.

    Attributes:
        losses: ``float64 [tokens_read - 1]``; entry ``i`` is that of token ``i + 1``.
        resident_tokens: KV tokens held while generating, in whole blocks.
        peak_tokens: the most KV tokens held, the chunk in flight included.
    """

    losses: np.ndarray
    seconds: float
    text: str = ""
    resident_tokens: int = 0
    peak_tokens: int = 0
    refusal: str = ""


@dataclass
class Report:
    """Everything that ``--json`` writes; ``tail`` is the last lines that were read."""

    model: str
    text: str
    context: int
    tokens: int
    losses_per_thousand: dict[str, list[float]] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    tail: str = ""
    continuation: str = ""
    resident_tokens: int = 0
    peak_tokens: int = 0
    stock_refusal: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class VllmReader:
    """One vLLM engine that scores a prompt and goes on from its end."""

    def __init__(self, model: str, sink: dict[str, int] | None) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        extra: dict[str, Any] = {}
        if sink is not None:
            extra["additional_config"] = {"sink_paged": sink}
        if current_platform.is_cpu():
            # vLLM's default there is nearly all memory of the machine.
            extra["kv_cache_memory_bytes"] = 256 * 2**20
        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=4,
            disable_log_stats=False,
            use_tqdm_on_load=False,
            **extra,
        )

    def __enter__(self) -> VllmReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def read(self, tokens: list[int], name: str, max_tokens: int) -> Reading:
        """Score ``tokens`` in one prefill, then generate ``max_tokens`` more."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.5,
            ignore_eos=True,
            prompt_logprobs=0,
        )
        started = time.monotonic()
        self.llm.enqueue([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        engine, outputs, resident = self.llm.llm_engine, [], [0]
        with progress_bar(len(tokens) + max_tokens, name) as bar:
            while not outputs:
                outputs = [output for output in engine.step() if output.finished]
                resident.append(self.resident_tokens() or resident[-1])
                left = len(tokens) - bar.n
                bar.update(min(CHUNK, left) if left > 0 else 1)
            bar.update(bar.total - bar.n)
        losses = [
            -entry[token].logprob
            for entry, token in zip(outputs[0].prompt_logprobs, tokens, strict=True)
            if entry is not None  # the first token is given, not predicted
        ]
        return Reading(
            losses=np.array(losses),
            seconds=time.monotonic() - started,
            text=outputs[0].outputs[0].text,
            resident_tokens=resident[-1],
            peak_tokens=max(resident),
        )

    def resident_tokens(self) -> int:
        """KV tokens of the blocks in use, from the engine's own gauges."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        cache = self.llm.llm_engine.vllm_config.cache_config
        blocks = (cache.num_gpu_blocks or 1) - 1  # one is vLLM's null block
        used: float = metrics["vllm:kv_cache_usage_perc"].value
        return round(used * blocks) * cache.block_size

    def refusal(self, tokens: list[int]) -> str:
        """Ask for one token after ``tokens`` and return the engine's complaint."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        prompt, params = {"prompt_token_ids": tokens}, SamplingParams(max_tokens=1)
        try:
            self.llm.enqueue([prompt], params, use_tqdm=False)
        except VLLMValidationError as error:
            return str(error).partition(", which exceeds")[0]
        return ""


def read_densely(model: str, tokens: list[int]) -> Reading:
    """Losses of the model in Hugging Face Transformers, every token seeing all before.

    Runs in chunks over a KV cache, so memory grows with the cache alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    started = time.monotonic()
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    cache, ids = DynamicCache(config=net.config), torch.tensor([tokens])
    losses: list[torch.Tensor] = []
    chunk = 512
    with torch.inference_mode(), progress_bar(len(tokens), "dense") as bar:
        for start in range(0, len(tokens) - 1, chunk):
            inputs = ids[:, start : min(start + chunk, len(tokens) - 1)]
            targets = ids[0, start + 1 : start + 1 + inputs.shape[1]]
            logits = net(input_ids=inputs, past_key_values=cache).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits.double(), targets, reduction="none"
                )
            )
            bar.update(inputs.shape[1])
        bar.update(bar.total - bar.n)
    return Reading(torch.cat(losses).numpy(), time.monotonic() - started)


def progress_bar(total: int, name: str) -> tqdm[Any]:
    """A bar over tokens on stderr."""
    return tqdm(total=total, unit="token", unit_scale=True, desc=f"{name:>13}")


def row_edges(context: int, tokens: int) -> list[int]:
    """Edges of the table's rows: what stock vLLM reads, thousands to 4k, doubling.

    Stock vLLM reads one token less than the context, as it insists to generate one.
    """
    edges = [e for e in (1000, 2000, 3000, 4000) if e > context] or [2 * context]
    while edges[-1] < tokens:
        edges.append(2 * edges[-1])
    return [0, *(e for e in (context - 1, *edges) if e < tokens), tokens]


def mean_between(losses: np.ndarray, start: int, end: int) -> float | None:
    """Mean loss of the tokens ``[start, end)``; None where not all were read."""
    if end - 1 > len(losses):
        return None
    return float(np.mean(losses[max(0, start - 1) : end - 1]))


def make_table(
    columns: dict[str, Reading], context: int, tokens: int
) -> list[dict[str, Any]]:
    """Mean losses by stretch of the text, one row each."""
    edges = row_edges(context, tokens)
    return [
        {"from": start, "to": end}
        | {name: mean_between(r.losses, start, end) for name, r in columns.items()}
        for start, end in zip(edges, edges[1:], strict=False)
    ]


def format_table(rows: list[dict[str, Any]], context: int) -> str:
    """The table as text; '-' where a way of reading did not get."""
    names = [name for name in rows[0] if name not in ("from", "to")]
    lines = [f"{'tokens':>17}" + "".join(f"{name:>15}" for name in names)]
    for row in rows:
        cells = ("-" if row[n] is None else f"{row[n]:.3f}" for n in names)
        note = "   <- trained context" if row["to"] == context - 1 else ""
        span = f"{row['from']:,} - {row['to']:,}"
        lines.append(f"{span:>17}" + "".join(f"{cell:>15}" for cell in cells) + note)
    return "\n".join(lines)


def per_thousand(losses: np.ndarray) -> list[float]:
    """Mean loss of each full or begun thousand tokens that were predicted."""
    starts = range(0, len(losses), 1000)
    return [round(float(losses[s : s + 1000].mean()), 5) for s in starts]


def load_tokens(model: str, text: str, limit: int | None) -> tuple[list[int], str]:
    """Tokens of the text, by the model's own tokenizer, and the last lines they hold.

    Args:
        model: its folder.
        text: what to read.
        limit: most tokens; None for all.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = list(tokenizer(text, verbose=False)["input_ids"])[:limit]
    read = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return tokens, "".join(read.splitlines(keepends=True)[-TAIL_LINES:])


def run_demo(args: argparse.Namespace, text: str) -> Report:
    """Read the text in the three ways, one engine at a time."""
    context = json.loads((args.model / "config.json").read_text())[
        "max_position_embeddings"
    ]
    model = str(args.model)
    tokens, tail = load_tokens(model, text, args.tokens)
    report = Report(args.model.name, args.text.name, context, len(tokens), tail=tail)
    say(
        f"{report.text}: {len(tokens):,} tokens, {len(tokens) / context:.0f} times the "
        f"trained context of {report.model} ({context})"
    )
    readings: dict[str, Reading] = {}
    sink = {"sink_tokens": args.sink_tokens}
    if args.sink_window:
        sink["window_tokens"] = args.sink_window
    with VllmReader(model, sink) as reader:
        readings["sink eviction"] = reader.read(tokens, "sink eviction", args.generate)
    with VllmReader(model, None) as reader:
        readings["stock vLLM"] = reader.read(tokens[: context - 1], "stock vLLM", 1)
        report.stock_refusal = reader.refusal(tokens)
    readings["dense"] = read_densely(model, tokens[: args.dense_tokens])

    report.table = make_table(readings, context, len(tokens))
    streamed = readings["sink eviction"]
    report.continuation = streamed.text
    report.resident_tokens = streamed.resident_tokens
    report.peak_tokens = streamed.peak_tokens
    for name, reading in readings.items():
        report.losses_per_thousand[name] = per_thousand(reading.losses)
        report.seconds[name] = round(reading.seconds, 1)
    return report


def print_report(report: Report) -> None:
    """Print the table, the continuation and the cache's size."""
    print("\nmean loss, nats per token (lower is better)\n")
    print(format_table(report.table, report.context))
    print(f"\nstock vLLM, given all of it: {report.stock_refusal or 'accepted'}")
    print("dense: the same model without a limit, past the positions it was trained on")
    print(f"\nthe stream goes on after {report.tokens:,} tokens (sampled):\n")
    for line in [*report.tail.splitlines(), "-- from here on the model --"]:
        print(f"    {line}")
    for line in report.continuation.splitlines():
        print(f"    {line}")
    print(
        f"\nKV cache: {report.resident_tokens:,} tokens resident of {report.tokens:,} "
        f"read, in whole blocks of {BLOCK};\nat most {report.peak_tokens:,} while a "
        f"prefill chunk of {CHUNK:,} was in flight"
    )


def say(message: str) -> None:
    """Write a line to stderr, where the progress goes."""
    print(message, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "models" / "pocket", help="a local folder")
    add("--text", type=Path, default=Path(argparse.__file__), help="what to read")
    add("--tokens", type=int, help="read no more than this many")
    add("--dense-tokens", type=int, default=8192, help="of the dense reading (8192)")
    add("--generate", type=int, default=240, help="tokens to go on for (240)")
    add("--sink-tokens", type=int, default=4)
    add("--sink-window", type=int, help="default: what the context leaves")
    add("--json", type=Path, help="also write everything there")
    add("--verbose", action="store_true", help="show vLLM's own log")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not (args.model / "config.json").is_file():
        say(f"error: no model in {args.model}; see scripts/train_pocket_model.py")
        return 2
    try:
        text = args.text.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        say(f"error: --text {args.text} is no readable UTF-8 text: {error}")
        return 2
    if "sink_paged" not in {e.name for e in entry_points(group="vllm.general_plugins")}:
        say("error: the package sink_paged is not installed in this Python")
        return 2
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # The gauge of the cache in use must be that of one engine of this process.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    report = run_demo(args, text)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
