#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Streaming perplexity of a text, for a list of cache configs.

Each config reads the text as one stream, by vLLM's engine, and gives the loss of every
token: a table as the paper's Table 2, log perplexity against text position as its
Figure 3, the losses as CSV.

``dense`` is quadratic in the text and reads ``--dense-tokens`` of it. ``recompute``
encodes a window anew for every token and is measured at ``--recompute-positions``
places spread over the text. All others read all of it, in chunks: prefill is exact.
``--oracle N`` lets a token-by-token loop in Hugging Face Transformers, which shares no
code with the engine, read the first ``N`` tokens, and compares the losses.

    python scripts/eval_perplexity.py --model models/pocket-sinks --output-dir OUT
    python scripts/eval_perplexity.py --model MODEL --text pg19/test \\
        --configs dense recompute 0+4095 4+4091 --tokens 4000000
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sink_paged.evaluation.configs import CacheConfig, cache_config, paper_configs
from sink_paged.evaluation.report import (
    Cell,
    Evaluation,
    Table,
    geometric_bins,
    new_axes,
    save_figure,
)
from sink_paged.evaluation.texts import (
    add_text_option,
    positive,
    read_texts,
    special_prefix,
    stream_tokens,
)

ROOT = Path(__file__).resolve().parents[1]
Array = np.ndarray[Any, Any]


@dataclass
class Reading:
    """What one config gave.

    Attributes:
        positions: text positions of the scored tokens, increasing.
        losses: in nats, of each.
        seconds: that scoring took, engine start excluded.
    """

    positions: Array
    losses: Array
    seconds: float

    def perplexity(self, begin: int, end: int) -> float | None:
        """Of the tokens at ``[begin, end)``; None where none was scored."""
        inside = (self.positions >= begin) & (self.positions < end)
        return float(np.exp(self.losses[inside].mean())) if inside.any() else None

    def perplexity_at(self, places: Array) -> float | None:
        """Of the tokens at ``places``; None where not all were scored."""
        inside = np.isin(self.positions, places)
        if inside.sum() < len(places):
            return None
        return float(np.exp(self.losses[inside].mean()))


def read_text(
    args: argparse.Namespace, config: CacheConfig, tokens: list[int], prefix: list[int]
) -> Reading:
    """Score the text by an engine of ``config``."""
    from sink_paged.evaluation import scoring

    length, options = args.length, {"dtype": args.dtype}
    if config.kind == "recompute":
        window = length
        first = min(length, len(tokens) - 1)
        positions = np.linspace(
            first, len(tokens) - 1, args.recompute_positions, dtype=int
        )
        positions = np.unique(positions)
        with scoring.open_engine(args.model, config, window + 2, **options) as llm:
            started = time.monotonic()
            losses = scoring.recompute(
                llm, tokens, positions.tolist(), window, prefix, str(config)
            )
    else:
        count = len(tokens)
        if config.kind == "dense":
            count = min(count, args.dense_tokens)
        with scoring.open_engine(args.model, config, count + 1, **options) as llm:
            started = time.monotonic()
            losses = scoring.score(llm, tokens[:count], str(config))
        positions = np.arange(1, count)
    return Reading(positions, losses, time.monotonic() - started)


def read_by_oracle(args: argparse.Namespace, tokens: list[int]) -> Reading | None:
    """The same by a loop that feeds token by token; None for other than Llama."""
    import torch
    from streams.peers.hf import SinkLlama
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if not isinstance(model, LlamaForCausalLM):
        say(f"--oracle: written for Llama, not for {type(model).__name__}; left out")
        return None
    window = args.oracle_config.window
    net = SinkLlama(model.eval(), 1, window.sink_tokens, window.window_tokens)
    started, losses = time.monotonic(), []
    text = torch.tensor([tokens])
    for i in tqdm(range(len(tokens) - 1), desc="oracle", unit="token"):
        logits = net.read(text[:, i : i + 1])[0].double()
        losses.append(-logits.log_softmax(0)[tokens[i + 1]].item())
    seconds = time.monotonic() - started
    return Reading(np.arange(1, len(tokens)), np.array(losses), seconds)


def perplexity_table(
    readings: dict[str, Reading], length: int, num_tokens: int
) -> Table:
    """As the paper's Table 2, by stretch of the text."""
    tail = max(length, num_tokens - num_tokens // 10)
    columns = ["cache config", "tokens scored", f"up to {length:,}", "all beyond"]
    columns.append(f"last tenth, from {tail:,}")
    sampled = readings.get("recompute")
    if sampled is not None:
        columns.append("at recompute's places")
    rows: list[list[Cell]] = []
    for name, reading in readings.items():
        spans = ((0, length), (length, num_tokens), (tail, num_tokens))
        row: list[Cell] = [name, len(reading.losses)]
        row += [reading.perplexity(*span) for span in spans]
        if sampled is not None:
            row.append(reading.perplexity_at(sampled.positions))
        rows.append([*row, round(len(reading.losses) / reading.seconds)])
    columns.append("tokens/s")
    title = f"Perplexity of {num_tokens:,} tokens, trained length {length:,}"
    return Table(title, columns, rows)


def sink_notes(readings: dict[str, Reading], begin: int, end: int) -> list[str]:
    """What the sinks are worth to the tokens ``[begin, end)``, by size of the cache."""
    by_capacity: dict[int, dict[int, float]] = {}
    for name, reading in readings.items():
        config = CacheConfig.parse(name)
        found = reading.perplexity(begin, end)
        if config.window is not None and config.positions == "cache" and found:
            sizes = by_capacity.setdefault(config.window.capacity, {})
            sizes[config.window.sink_tokens] = found
    notes = []
    for capacity, found in by_capacity.items():
        if 0 not in found or len(found) < 2:
            continue
        best = min((value, count) for count, value in found.items() if count)
        excess = 100 * (found[0] / best[0] - 1)
        notes.append(
            f"In a cache of {capacity:,} tokens, no sinks instead of {best[1]} cost "
            f"{excess:+.1f} % of perplexity."
        )
    return notes


def plot_losses(readings: dict[str, Reading], length: int) -> Any:
    """Log perplexity against the text position, in bins that grow with it."""
    figure, axes = new_axes(width=8.0)
    axis = axes[0][0]
    # Curves that coincide are seen as the edges of each other.
    widths = np.linspace(3.5, 1.0, len(readings))
    for (name, reading), width in zip(readings.items(), widths, strict=True):
        if name == "recompute":
            bins = np.array_split(np.arange(len(reading.losses)), 4)
            bins = [part for part in bins if len(part)]
            places = [reading.positions[part].mean() for part in bins]
            heights = [reading.losses[part].mean() for part in bins]
            axis.plot(places, heights, "k^", markersize=5, label=name)
            continue
        edges = geometric_bins(len(reading.losses), min(128, length // 4))
        pairs = list(zip(edges, edges[1:], strict=False))
        places = [(begin + end) / 2 for begin, end in pairs]
        heights = [reading.losses[begin:end].mean() for begin, end in pairs]
        style = "--" if name == "dense" else "-"
        axis.plot(places, heights, style, linewidth=width, label=name)
    axis.axvline(length, color="grey", linewidth=0.8, linestyle=":")
    place = {"xycoords": ("data", "axes fraction"), "va": "top", "color": "grey"}
    axis.annotate(" trained length", (length, 0.97), **place)
    axis.set_xscale("log")
    axis.set_xlabel("text position (tokens)")
    axis.set_ylabel("log perplexity (nats per token)")
    axis.legend(fontsize=8)
    return figure


def write_losses(readings: dict[str, Reading], tokens: list[int], folder: Path) -> None:
    """A CSV file for each config: position, token, loss."""
    for name, reading in readings.items():
        with (folder / f"losses-{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["position", "token", "loss"])
            pairs = zip(reading.positions, reading.losses, strict=True)
            writer.writerows((p, tokens[p], f"{loss:.6f}") for p, loss in pairs)


def compare(reading: Reading, oracle: Reading) -> tuple[Table, dict[str, float]]:
    """How far the engine's losses are from the oracle's."""
    count = len(oracle.losses)
    gaps = np.abs(reading.losses[:count] - oracle.losses)
    figures = {"largest": float(gaps.max()), "mean": float(gaps.mean())}
    title = f"Against a token-by-token loop, {count:,} losses"
    columns = ["", "largest difference", "mean difference", "loop's tokens/s"]
    speed = round(count / oracle.seconds)
    row: list[Cell] = ["nats", f"{gaps.max():.1e}", f"{gaps.mean():.1e}", speed]
    return Table(title, columns, [row]), figures


def say(message: str) -> None:
    """Write a line to stderr, where the progress goes."""
    print(message, file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "models" / "pocket-sinks"), help="folder or name")
    add_text_option(parser)
    add(
        "--configs",
        nargs="+",
        type=cache_config,
        metavar="CONFIG",
        help="dense, recompute, S+R, S+R@text; default: dense, recompute and 0, 1, 2, "
        "4, 8 sinks in a cache of the trained length",
    )
    add("--tokens", type=positive(), default=100_000, help="read so many (100000)")
    add("--dense-tokens", type=positive(), help="of dense; default: 8 trained lengths")
    add("--recompute-positions", type=positive(), default=256, metavar="N")
    add("--oracle", type=int, default=0, metavar="N", help="tokens for the loop (0)")
    add("--oracle-config", type=cache_config, help="default: the first with sinks")
    add("--dtype", default="auto", help="of the model, as in vLLM (auto)")
    add("--name", default="perplexity", help="of the files written (perplexity)")
    add("--title", default="Streaming perplexity")
    add("--output-dir", type=Path, default=Path("results"))
    args = parser.parse_args()
    if args.oracle_config is not None and args.oracle_config.window is None:
        parser.error("--oracle-config must be of the form S+R")
    return args


def summary(args: argparse.Namespace, num_tokens: int) -> str:
    """What was done."""
    text = (
        f"{Path(args.model).name} reads {num_tokens:,} tokens "
        f"({', '.join(path.name for path in args.text)}) as one stream. Perplexity is "
        "exp of the mean loss of a token."
    )
    kinds = {config.kind for config in args.configs}
    if "dense" in kinds:
        text += (
            " dense keeps all tokens and runs past the trained length of "
            f"{args.length:,}."
        )
    if "recompute" in kinds:
        text += (
            f" recompute encodes the last {args.length:,} tokens anew for each of "
            f"{args.recompute_positions} places."
        )
    if any(config.positions == "text" for config in args.configs):
        text += " @text counts positions in the text, all others in the cache."
    return text


def run(args: argparse.Namespace) -> Evaluation:
    """Read the text by every config."""
    from provenance import provenance
    from transformers import AutoTokenizer

    from sink_paged.evaluation.scoring import trained_length

    started = time.monotonic()
    args.length = trained_length(args.model)
    args.configs = args.configs or paper_configs(args.length - 1)
    args.dense_tokens = args.dense_tokens or 8 * args.length
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = stream_tokens(tokenizer, read_texts(args.text), args.tokens)
    if len(tokens) < 2:
        raise ValueError("the text has no token to predict")
    prefix = special_prefix(tokenizer)
    say(f"{len(tokens):,} tokens, {len(tokens) / args.length:.1f} trained lengths")
    readings = {
        str(config): read_text(args, config, tokens, prefix) for config in args.configs
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_losses(readings, tokens, args.output_dir)
    figure = plot_losses(readings, args.length)
    evaluation = Evaluation(
        name=args.name,
        title=args.title,
        summary=summary(args, len(tokens)),
        command=shlex.join(["python", *sys.argv]),
        provenance=provenance(),
        tables=[perplexity_table(readings, args.length, len(tokens))],
        plots=[save_figure(figure, args.output_dir, args.name)],
        notes=sink_notes(readings, args.length, len(tokens)),
    )
    if args.oracle:
        add_oracle(args, evaluation, readings, tokens)
    evaluation.seconds = round(time.monotonic() - started, 1)
    return evaluation


def add_oracle(
    args: argparse.Namespace,
    evaluation: Evaluation,
    readings: dict[str, Reading],
    tokens: list[int],
) -> None:
    """Compare one config's losses with the loop's."""
    with_sinks = [c for c in args.configs if c.window and c.window.sink_tokens]
    config = args.oracle_config or next(iter(with_sinks), None)
    if config is None or str(config) not in readings or config.positions != "cache":
        say("--oracle: none of --configs is of the form S+R; left out")
        return
    args.oracle_config = config
    oracle = read_by_oracle(args, tokens[: args.oracle])
    if oracle is not None:
        table, figures = compare(readings[str(config)], oracle)
        table.title += f", {config}"
        evaluation.tables.append(table)
        evaluation.data["oracle"] = {"config": str(config), **figures}


def main() -> int:
    args = parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        evaluation = run(args)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    file = evaluation.write(args.output_dir)
    for table in evaluation.tables:
        print("\n" + table.plain())
    print(f"\n{file}, {', '.join(evaluation.plots)}, losses-*.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
