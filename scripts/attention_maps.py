#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Does a model have attention sinks? Its attention logits, the first tokens' share.

Three looks at a model, as Hugging Face Transformers runs it:

- the average attention logits (scaled, before the softmax) of each layer and head over
  many short texts: Figure 2 of the StreamingLLM paper, with its 256 texts of 16 tokens;
- the share of attention (after the softmax) that the first token and the first four
  tokens take as a text grows, and that the four tokens before the query take;
- the norms of the first tokens' keys and values against those of the other tokens.

Texts are cut from files at random places; the BOS token, where the tokenizer puts one
in front, is the first of their tokens. Written to ``--output-dir``: two plots and
``attention_maps.json``.

Models that do not dispatch through Transformers' ``AttentionInterface`` (MPT, BLOOM,
Falcon, GPT-J) are refused.

Examples::

    python scripts/attention_maps.py
    python scripts/attention_maps.py --model meta-llama/Llama-2-7b-hf --text book.txt \
        --layers 0 1 2 9 16 23 31 --heads 0
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from transformers import AutoTokenizer

from sink_paged.evaluation.attention_maps import (
    FIRST,
    PARTS,
    Array,
    LogitSums,
    ShareSums,
    cut_texts,
    load_model,
    observe,
    position_bins,
)
from sink_paged.evaluation.report import Evaluation, Table, new_axes, save_figure
from sink_paged.evaluation.scoring import trained_length
from sink_paged.evaluation.texts import (
    HELD_OUT,
    held_out_files,
    positive,
    read_texts,
    special_prefix,
)

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 8192
"""Tokens of the long texts where nothing is asked for."""
BATCH = 2048
"""Tokens of short texts that run at once."""


@dataclass
class Findings:
    """What was measured.

    Attributes:
        edges: of the bins of query positions.
        end: the bin that ends at the trained length, or at the texts' where that is
            less.
        logits: by layer ``[heads, queries, keys]``.
        shares: by layer ``[parts, heads, bins]``.
        norms: by layer, of keys and values ``[2, FIRST]``.
        layers: to be drawn.
        heads: to be drawn.
    """

    edges: list[int]
    end: int
    logits: dict[int, Array]
    shares: dict[int, Array]
    norms: dict[int, Array]
    layers: list[int]
    heads: list[int]

    def at_end(self, layer: int) -> Array:
        """Shares at the end of the trained length, ``[parts, heads]``."""
        return self.shares[layer][..., self.end]

    @property
    def end_queries(self) -> str:
        """Those that ``at_end`` is the mean of."""
        low, high = self.edges[self.end : self.end + 2]
        return f"{low:,} - {high - 1:,}"


def measure(args: argparse.Namespace) -> tuple[Findings, dict[str, Any]]:
    """Run the model; the settings of the run too."""
    device = pick_device(args.device)
    texts = list(read_texts(args.text))
    trained = trained_length(args.model)
    length = args.length or min(trained, LONGEST)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prefix = [] if args.no_bos else special_prefix(tokenizer)
    documents = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in texts
    ]
    tokens = args.sentence_tokens
    short = cut_texts(documents, args.sentences, tokens, prefix, args.seed)
    long = cut_texts(documents, args.texts, length, prefix, args.seed)
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")
    model = load_model(args.model, device, dtype)

    logits = LogitSums()
    observe(model, short, logits, max(1, BATCH // tokens), "short texts")
    means = logits.means()
    layers = choose("layers", list(means), args.layers)
    fewest = min(len(means[layer]) for layer in layers)
    heads = choose("heads", list(range(fewest)), args.heads)

    edges = position_bins(trained, length)
    sums = ShareSums(edges)
    observe(model, long, sums, name="long texts")
    end = edges.index(min(trained, length)) - 1
    settings = {
        "model": args.model,
        "trained_length": trained,
        "sentences": args.sentences,
        "sentence_tokens": tokens,
        "texts": args.texts,
        "length": length,
        "prefix": prefix,
        "seed": args.seed,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": [path.name for path in args.text],
    }
    found = Findings(edges, end, means, sums.shares(), sums.norms(), layers, heads)
    return found, settings


def pick_device(name: str) -> str:
    """A device of torch that is there; ``auto``: a GPU, or else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {error}") from None
    return name


def choose(what: str, there: list[int], asked: list[int] | None) -> list[int]:
    """What of a model's layers or heads to draw: all of a few, or evenly spread ones.

    Raises:
        ValueError: when one that was asked for is not there.
    """
    if asked:
        for number in asked:
            if number not in there:
                raise ValueError(
                    f"--{what} {number}: the model has {what} {there[0]} to {there[-1]}"
                )
        return sorted(set(asked))
    if len(there) <= 8:
        return there
    some = np.linspace(0, len(there) - 1, 8 if what == "layers" else 4)
    return [there[round(index)] for index in some]


def draw_logits(found: Findings, settings: dict[str, Any], folder: Path) -> str:
    """Heat maps on one scale of colours: a row a layer, a column a head."""
    maps = [drawn_maps(found, layer) for layer in found.layers]
    values = np.concatenate([m.ravel() for row in maps for m in row.values()])
    low, high = np.nanpercentile(values, [1, 99])
    columns = list(maps[0])
    figure, axes = new_axes(len(columns) + 1, len(maps))
    size = 1.7
    figure.set_size_inches(size * len(columns) + 1.0, size * len(maps) + 1.0)
    for axis_row, layer, row in zip(axes, found.layers, maps, strict=True):
        for axis, logits in zip(axis_row, row.values(), strict=False):
            image = axis.imshow(logits, cmap="viridis", vmin=low, vmax=high)
            axis.tick_params(labelsize=7)
            for side in (axis.xaxis, axis.yaxis):
                side.get_major_locator().set_params(integer=True)
            axis.label_outer()
        axis_row[0].set_ylabel(f"layer {layer}\nquery", fontsize=8)
        axis_row[-1].remove()
    for axis, name in zip(axes[0], columns, strict=False):
        axis.set_title(name, fontsize=9)
    for axis in axes[-1, :-1]:
        axis.set_xlabel("key", fontsize=8)
    grid = axes[0, 0].get_gridspec()
    grid.set_width_ratios([1.0] * len(columns) + [0.1])
    bar = figure.add_subplot(grid[:, -1])
    figure.colorbar(image, cax=bar, extend="both", label="logit")
    figure.suptitle(
        f"{model_name(settings)}: average attention logits of "
        f"{settings['sentences']:,} texts of {settings['sentence_tokens']} tokens",
        fontsize=10,
    )
    return save_figure(figure, folder, "attention_logits")


def drawn_maps(found: Findings, layer: int) -> dict[str, Array]:
    """The maps of a layer that are drawn."""
    maps = found.logits[layer]
    heads = {f"head {head}": maps[head] for head in found.heads}
    return {"mean of heads": maps.mean(axis=0)} | heads


def draw_shares(found: Findings, settings: dict[str, Any], folder: Path) -> str:
    """Shares over the query's position: a panel a layer, the legend below."""
    columns = min(4, len(found.layers))
    rows = -(-len(found.layers) // columns)
    figure, axes = new_axes(columns, rows + 1)
    figure.set_size_inches(max(7.0, 3.4 * columns), 2.8 * rows + 1.2)
    panels = axes[:-1].ravel()
    for axis, layer in zip(panels, found.layers, strict=False):
        draw_layer(axis, found, layer, settings["trained_length"])
    for axis in [*panels[len(found.layers) :], *axes[-1]]:
        axis.remove()
    for axis in axes[:-1, 0]:
        axis.set_ylabel("share of attention")
    for axis in panels[max(0, len(found.layers) - columns) : len(found.layers)]:
        axis.set_xlabel("position of the query")
    grid = axes[0, 0].get_gridspec()
    grid.set_height_ratios([1.0] * rows + [0.12])
    below = figure.add_subplot(grid[-1, :])
    below.axis("off")
    lines, names = panels[0].get_legend_handles_labels()
    below.legend(lines, names, loc="center", ncols=min(5, len(names)), fontsize=8)
    heads = ", ".join(map(str, found.heads))
    figure.suptitle(
        f"{model_name(settings)}: share of attention, mean of all heads (thick lines), "
        f"heads {heads} (thin)",
        fontsize=10,
    )
    return save_figure(figure, folder, "attention_shares")


def draw_layer(axis: Any, found: Findings, layer: int, trained: int) -> None:
    """One panel of ``draw_shares``."""
    low, high = np.array(found.edges[:-1]), np.array(found.edges[1:])
    middles = (low + high - 1) / 2
    for name, colour, shares in zip(
        PARTS, ("C3", "C0", "C2"), found.shares[layer], strict=True
    ):
        thin = shares[found.heads].T
        axis.plot(middles, thin, color=colour, linewidth=0.6, alpha=0.35)
        axis.plot(middles, shares.mean(axis=0), color=colour, linewidth=2, label=name)
    even = FIRST / (middles + 1)
    axis.plot(middles, even, "k:", linewidth=1, label="any four, were it even")
    if trained < found.edges[-1]:
        axis.axvline(
            trained, color="grey", linestyle="--", linewidth=1, label="trained length"
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(0, 1)
    axis.set_title(f"layer {layer}", fontsize=9)
    axis.tick_params(labelsize=8)


def model_name(settings: dict[str, Any]) -> str:
    """Of a figure's title."""
    return Path(settings["model"]).name


def layer_table(found: Findings, threshold: float) -> Table:
    """Shares at the end of the trained length, a layer a row."""
    rows: list[list[Any]] = []
    for layer in found.shares:
        first, first_four, recent = found.at_end(layer)
        sinks = f"{int((first > threshold).sum())} of {len(first)}"
        means = [float(part.mean()) for part in (first, first_four, recent)]
        rows.append([layer, *means, float(first.max()), sinks])
    columns = ["layer", *PARTS, "first token, highest head", "sink heads"]
    title = f"Share of attention, mean of heads, queries {found.end_queries}"
    return Table(title, columns, rows)


def head_table(found: Findings) -> Table:
    """Shares at the end of the trained length, a head that is drawn a row."""
    rows: list[list[Any]] = [
        [f"{layer}.{head}", *(float(part[head]) for part in found.at_end(layer))]
        for layer in found.layers
        for head in found.heads
    ]
    title = f"Share of attention by head, queries {found.end_queries}"
    return Table(title, ["layer.head", *PARTS], rows)


def norm_table(found: Findings) -> Table:
    """Norms of keys and values of the first tokens."""
    rows: list[list[Any]] = [
        [layer]
        + [x for first, *others in norms.tolist() for x in (first, np.mean(others))]
        for layer, norms in found.norms.items()
    ]
    columns = ["layer", "key, first token", "keys, tokens 2-4"]
    columns += ["value, first token", "values, tokens 2-4"]
    return Table("Norms over the median norm of the later tokens", columns, rows)


def sink_heads(found: Findings, threshold: float) -> str:
    """How many there are."""
    first = np.concatenate([found.at_end(layer)[0] for layer in found.shares])
    return (
        f"sink heads, whose first token takes more than {threshold:.0%} of attention "
        f"(queries {found.end_queries}): {int((first > threshold).sum())} of "
        f"{len(first)}"
    )


def figures(found: Findings, settings: dict[str, Any]) -> dict[str, Any]:
    """What the tables do not show, and the numbers behind the plots."""
    return {
        "settings": settings,
        "edges": found.edges,
        "logits": {
            layer: {
                name.removeprefix("head "): [
                    [None if np.isnan(x) else round(x, 4) for x in row[: query + 1]]
                    for query, row in enumerate(logits.tolist())
                ]
                for name, logits in drawn_maps(found, layer).items()
            }
            for layer in found.layers
        },
        "shares": {
            layer: dict(zip(PARTS, found.shares[layer].round(5).tolist(), strict=True))
            for layer in found.layers
        },
        "shares_at_end": {
            layer: dict(zip(PARTS, found.at_end(layer).round(5).tolist(), strict=True))
            for layer in found.shares
        },
        "norms": {
            layer: dict(zip(("keys", "values"), norms.round(4).tolist(), strict=True))
            for layer, norms in found.norms.items()
        },
    }


def report(
    args: argparse.Namespace, found: Findings, settings: dict[str, Any]
) -> Evaluation:
    """Tables and plots, the plots in ``--output-dir``."""
    queries = int(np.mean(found.edges[found.end : found.end + 2]))
    first = "begin with the BOS token" if settings["prefix"] else "have no BOS token"
    length = f"{settings['length']:,}"
    heads = sink_heads(found, args.sink_share)
    return Evaluation(
        name="attention_maps",
        title="Attention maps",
        summary=(
            f"Attention of {model_name(settings)}, {settings['dtype']}, as "
            f"Transformers computes it: logits over {args.sentences:,} texts of "
            f"{args.sentence_tokens} tokens, shares and norms over {args.texts:,} "
            f"texts of {length}, all cut at random places of "
            f"{', '.join(settings['text'])}. {heads[0].upper()}{heads[1:]}."
        ),
        command=f"python scripts/attention_maps.py {shlex.join(args.command)}".strip(),
        provenance=provenance(),
        tables=[layer_table(found, args.sink_share), head_table(found)]
        + [norm_table(found)],
        plots=[
            draw_logits(found, settings, args.output_dir),
            draw_shares(found, settings, args.output_dir),
        ],
        notes=[
            f"All texts {first}. Were attention even, one token would take "
            f"{1 / queries:.2g}, four {FIRST / queries:.2g} there.",
            "Logits are scaled by the model's own factor, before the softmax, with its "
            "soft cap if it has one; one scale of colours, cut at the 1st and 99th "
            "percentile. Logits of a row may be compared with one another; a constant "
            "added to all of them changes nothing.",
        ],
        data=figures(found, settings),
    )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default=str(ROOT / "models" / "pocket"),
        help="folder or name of a checkpoint (models/pocket)",
    )
    add(
        "--text",
        nargs="+",
        type=Path,
        default=held_out_files(),
        metavar="PATH",
        help="text files, .jsonl files with a `text` field, or folders of both, which "
        f"texts are cut from (this Python's {', '.join(HELD_OUT)})",
    )
    add("--sentences", type=positive(), default=256, help="short texts (256)")
    add("--sentence-tokens", type=int, default=16, help="tokens of each (16)")
    add("--texts", type=positive(), default=16, help="long texts (16)")
    add(
        "--length",
        type=int,
        help="tokens of each, may exceed the trained length (the trained length, at "
        f"most {LONGEST:,})",
    )
    add("--no-bos", action="store_true", help="no token in front of the texts")
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="layers to draw, from 0 (all up to 8, else 8 evenly spread)",
    )
    add(
        "--heads",
        type=int,
        nargs="+",
        metavar="HEAD",
        help="heads to draw beside their mean, from 0 (all up to 8, else 4)",
    )
    add(
        "--sink-share",
        type=float,
        default=0.3,
        help="share of the first token above which a head is a sink head (0.3)",
    )
    add("--device", default="auto", help="of torch (auto: a GPU if there is one)")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (float32 on a CPU, else auto, as in the checkpoint)",
    )
    add("--seed", type=int, default=0, help="of the places where texts are cut (0)")
    add("--output-dir", type=Path, default=Path("attention_maps_out"))
    args = parser.parse_args(arguments)
    args.command = list(arguments)
    if args.sentence_tokens < 2:
        parser.error("--sentence-tokens must be at least 2")
    if args.length is not None and args.length < 16:
        parser.error("--length must be at least 16")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    started = time.monotonic()
    try:
        found, settings = measure(args)
    except (OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    result = report(args, found, settings)
    result.seconds = round(time.monotonic() - started, 1)
    for table in result.tables:
        print(f"\n{table.plain()}")
    print(f"\n{sink_heads(found, args.sink_share)}")
    file = result.write(args.output_dir)
    print("written:", *(args.output_dir / plot for plot in result.plots), file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
