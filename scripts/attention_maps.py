#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
r"""Does a model have attention sinks? Its attention logits, the first tokens' share.

Three looks at a model, as Hugging Face Transformers runs it:

- the average attention logits (scaled, before the softmax) of each layer and head over
  many short texts: Figure 2 of the StreamingLLM paper, with its 256 texts of 16 tokens;
- the share of attention (after the softmax) that the first token and the first four
  tokens take as a text grows, and that the four tokens before the query take;
- the norms of the first tokens' keys and values against those of the other tokens.

Texts are cut from files at random places; the BOS token, where the tokenizer puts one
in front, is the first of their tokens. Written to ``--output-dir``: two plots and
``<name>.json``.

Models that do not dispatch through Transformers' ``AttentionInterface`` (MPT, BLOOM,
Falcon, GPT-J) are refused. Where a layer has a window of its own, the first tokens'
share is 0 past it; where heads have a learned sink logit, that takes a share too.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from transformers import AutoTokenizer

from sink_paged.evaluation.attention_maps import (
    FIRST,
    LogitSums,
    ShareSums,
    cut_texts,
    position_bins,
)
from sink_paged.evaluation.attention_observer import load_model, observe
from sink_paged.evaluation.attention_results import (
    Findings,
    draw_logits,
    draw_shares,
    figures,
    head_table,
    layer_table,
    model_name,
    norm_table,
    sink_heads,
)
from sink_paged.evaluation.report import Evaluation
from sink_paged.evaluation.scoring import trained_length
from sink_paged.evaluation.texts import (
    add_text_option,
    positive,
    read_texts,
    special_prefix,
)

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 8192
"""Tokens of the long texts where nothing is asked for."""
BATCH = 2048
"""Tokens of short texts that run at once."""


def measure(args: argparse.Namespace) -> tuple[Findings, dict[str, Any]]:
    """Run the model; the settings of the run too."""
    device = pick_device(args.device)
    texts = list(read_texts(args.text))
    try:
        trained = trained_length(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model}: {error}") from None
    length = args.length or min(trained, LONGEST)
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
        "model": Path(args.model).name,
        "trained_length": trained,
        "sentences": args.sentences,
        "sentence_tokens": tokens,
        "texts": args.texts,
        "length": length,
        "prefix": prefix,
        "special_tokens": tokenizer.convert_ids_to_tokens(prefix),
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


def report(
    args: argparse.Namespace, found: Findings, settings: dict[str, Any]
) -> Evaluation:
    """Tables and plots, the plots in ``--output-dir``."""
    queries = int(np.mean(found.edges[found.end : found.end + 2]))
    special = " ".join(settings["special_tokens"])
    first = f"begin with {special}" if special else "have no BOS token"
    length = f"{settings['length']:,}"
    heads = sink_heads(found, args.sink_share)
    return Evaluation(
        name=args.name,
        title=args.title,
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
            draw_logits(found, settings, args.output_dir / f"{args.name}_logits"),
            draw_shares(found, settings, args.output_dir / f"{args.name}_shares"),
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
        default=str(ROOT / "models" / "pocket-sinks"),
        help="folder or name of a checkpoint (models/pocket-sinks)",
    )
    add_text_option(parser)
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
    add("--name", default="attention_maps", help="of the files (attention_maps)")
    add("--title", default="Attention maps")
    add("--output-dir", type=Path, default=Path("results"))
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
