#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
r"""StreamEval: questions about a text that goes on, by cache config.

The text is made of lines, each a key and a value. After every tenth comes a question,
the value of a key 20 lines back (Xiao et al., 2023, section 4.3; the text is generated,
as theirs was not released). Two questions are asked of a model:

- accuracy by position: does it keep answering, far past its window? ``dense`` is what
  stock vLLM would do without its limit of length, read up to ``--dense-tokens``;
  ``0+R`` is window attention;
- accuracy by distance (their appendix): how many lines back may the fact stand? What
  has left the window cannot be known.

An answer is right when all of its tokens are. By default a text with the true answers
in it is read once, and an answer counts when greedy decoding after the question would
have written it. ``--generate`` decodes each answer and leaves it in the text.
``--server`` asks a server that runs, with OpenAI's API; it resends the conversation
with every question, which the prefix cache makes cheap.

Figures go to the terminal and to ``--output-dir``: ``<name>.json`` and two plots.

Examples::

    python scripts/eval_stream_qa.py --quick
    python scripts/eval_stream_qa.py --distances 10 20 30 40 50 80
    python scripts/eval_stream_qa.py --model meta-llama/Llama-2-7b-hf \
        --configs dense 0+2048 4+2044 --tokens 120000
    python scripts/eval_stream_qa.py --server http://127.0.0.1:8000/v1 --tokens 20000

    make serve MODEL=models/pocket-sinks  # and then, in another shell
    python scripts/eval_stream_qa.py --server http://127.0.0.1:8000/v1 --style short \
        --reply-tokens 4 --tokens 20000 --distance 5 --distances 3 8 14
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sink_paged.evaluation.configs import CacheConfig, cache_config
from sink_paged.evaluation.report import Evaluation
from sink_paged.evaluation.scoring import open_engine, trained_length
from sink_paged.evaluation.stream_answers import (
    TokenStream,
    ask_server,
    generate_answers,
    make_stream,
    score_answers,
    tokens_per_line,
)
from sink_paged.evaluation.stream_eval import STYLES, generate
from sink_paged.evaluation.stream_results import (
    Answers,
    Plan,
    counts,
    distance_table,
    plot_distances,
    plot_positions,
    position_table,
    reading_table,
)
from sink_paged.evaluation.texts import positive

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CAPACITY = 4095
"""The largest cache of the default configs: models of a long context show nothing else
in a text of 100,000 tokens."""
WINDOW_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2, 4)
"""The default distances, as shares of the window."""
SWEEP_SEED = 1_000_000


class UserError(Exception):
    """What the user can put right; its text says how."""


def make_plan(args: argparse.Namespace, tokenizer: Any) -> Plan:
    """Fill in what the command line left open.

    Raises:
        UserError: for what the model cannot do.
    """
    trained = trained_length(args.model)
    style = STYLES[args.style or ("short" if len(tokenizer) <= 512 else "paper")]
    if not args.configs:
        capacity = min(trained - 1, DEFAULT_CAPACITY)
        names = ("dense", f"0+{capacity}", f"4+{capacity - 4}")
        args.configs = [CacheConfig.parse(name) for name in names]
    windows = [config.window for config in args.configs if config.window is not None]
    capacity = max((window.capacity for window in windows), default=trained - 1)
    if capacity >= trained:
        raise UserError(
            f"a cache of {capacity} tokens and one more do not fit the trained length "
            f"of {trained}"
        )
    if args.dense_tokens is None:
        args.dense_tokens = min(max(8192, 4 * trained), 32768)
    line_tokens = tokens_per_line(tokenizer, style, args.every)
    lines = capacity / line_tokens
    default = sorted({max(1, round(lines * part)) for part in WINDOW_SHARES})
    return Plan(style, args.distances or default, trained, capacity, line_tokens)


def make_streams(
    args: argparse.Namespace, tokenizer: Any, plan: Plan
) -> tuple[list[TokenStream], list[TokenStream]]:
    """The texts by position and those by distance, ``--streams`` of each.

    All but the first end where dense ends: where the comparison is, and where a text
    has few questions before.
    """
    lengths = [args.tokens] + [min(args.tokens, args.dense_tokens)] * (args.streams - 1)

    def streams(
        first_seed: int, distance: int | list[int], name: str
    ) -> list[TokenStream]:
        return [
            make_stream(
                tokenizer, plan.style, first_seed + i, length, args.every, distance
            )
            for i, length in enumerate(tqdm(lengths, desc=name, unit="text"))
        ]

    return (
        streams(args.seed, args.distance, "texts by position"),
        streams(args.seed + SWEEP_SEED, plan.distances, "texts by distance"),
    )


def answer(
    args: argparse.Namespace,
    config: CacheConfig,
    by_position: list[TokenStream],
    by_distance: list[TokenStream],
) -> Answers:
    """All answers of one config, by an engine of its own."""
    tokens = args.tokens
    if config.kind == "dense":
        tokens = min(tokens, args.dense_tokens)
    streams = [stream.first(tokens) for stream in by_position + by_distance]
    with open_engine(args.model, config, tokens + 1, dtype=args.dtype) as llm:
        started = time.monotonic()
        if args.generate:
            outcomes = [
                generate_answers(llm, stream, own=True, name=str(config))[0]
                for stream in streams
            ]
        else:
            outcomes = score_answers(llm, streams, str(config))
        seconds = time.monotonic() - started
    cut = len(by_position)
    return Answers(tokens, seconds, sum(outcomes[:cut], []), sum(outcomes[cut:], []))


def run_engines(args: argparse.Namespace) -> tuple[Plan, dict[str, Answers]]:
    """Ask engines of all configs, one after the other."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        plan = make_plan(args, tokenizer)
        texts = make_streams(args, tokenizer, plan)
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    answers = {str(config): answer(args, config, *texts) for config in args.configs}
    return plan, answers


def run_server(args: argparse.Namespace) -> tuple[Plan, dict[str, Answers]]:
    """Ask a server, one conversation after the other."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=args.server, api_key=os.getenv("OPENAI_API_KEY", "none"))
    try:
        model = args.model or client.models.list().data[0].id
    except OpenAIError as error:
        raise UserError(f"no answer from {args.server}: {error}") from error
    style = STYLES[args.style or "paper"]
    plan = Plan(style, args.distances or [10, 20, 40, 80, 160])
    answers = Answers()
    started = time.monotonic()
    for seed, distance, outcomes in (
        (args.seed, args.distance, answers.by_position),
        (args.seed + SWEEP_SEED, plan.distances, answers.by_distance),
    ):
        for number in range(args.streams):
            pieces = generate(seed + number, style, 10**9, args.every, distance)
            name = f"conversation of seed {seed + number}"
            asked = ask_server(
                client, model, style, pieces, args.api, args.reply_tokens
            )
            bar = tqdm(total=args.tokens, desc=name, unit="token", unit_scale=True)
            try:
                with bar:
                    for outcome in asked:
                        bar.update(min(outcome.position, args.tokens) - bar.n)
                        outcomes.append(outcome)
                        if outcome.position >= args.tokens:
                            break
            except OpenAIError as error:
                answers.refusal = str(error)
    if not answers.by_position:
        raise UserError(f"{args.server} answered nothing: {answers.refusal}")
    answers.seconds = time.monotonic() - started
    answers.tokens = max(o.position for o in answers.by_position)
    return plan, {Path(model).name: answers}


def summary(args: argparse.Namespace, plan: Plan) -> str:
    """What was done."""
    line = f" of {plan.line_tokens:.1f} tokens" if plan.line_tokens else ""
    model = f"{Path(args.model).name} reads lines" if args.model else "Lines"
    text = (
        f"{model}{line}, each a key and a value; after every {args.every} a question, "
        f"by position about the line {args.distance} lines back. By position and by "
        f"distance: a text of {args.tokens:,} tokens each"
    )
    if args.streams > 1:
        text += f" and {args.streams - 1} of the first tokens that dense reads"
    text += ". "
    if args.server:
        return text + f"Asked of a server, {args.api} API, the whole text each time."
    if args.generate:
        return text + "Each answer was decoded greedily and left in the text."
    return text + (
        "An answer is right when greedy decoding after the question gives all of its "
        "tokens; the answers before it in the text are the true ones."
    )


def notes(args: argparse.Namespace, answers: dict[str, Answers]) -> list[str]:
    """What the tables do not say."""
    found = ["Bars in the plots are 95% intervals (Wilson)."]
    if "dense" in answers and answers["dense"].tokens < args.tokens:
        read = answers["dense"].tokens
        found.append(
            f"dense reads {read:,} tokens of a text, as its cost grows with the square."
        )
    for name, each in answers.items():
        if each.refusal:
            found.append(f"{name} stopped at {each.tokens:,} tokens: {each.refusal}")
    return found


def evaluate(args: argparse.Namespace) -> Evaluation:
    """Ask, and put together what came out."""
    from provenance import provenance

    started = time.monotonic()
    plan, answers = run_server(args) if args.server else run_engines(args)
    folder = args.output_dir
    return Evaluation(
        name=args.name,
        title=args.title,
        summary=summary(args, plan),
        command=shlex.join(["python", *sys.argv]),
        provenance=provenance(),
        seconds=round(time.monotonic() - started, 1),
        tables=[
            position_table(plan, answers),
            distance_table(plan, answers),
            reading_table(answers),
        ],
        plots=[
            plot_positions(plan, answers, folder, args.name),
            plot_distances(plan, answers, folder, args.name),
        ],
        notes=notes(args, answers),
        data={
            "model": Path(args.model).name if args.model else None,
            "style": plan.style.name,
            "trained_length": plan.trained,
            "window_lines": plan.window_lines,
            "counts": {name: counts(plan, each) for name, each in answers.items()},
        },
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a folder or a name (models/pocket-sinks)")
    add(
        "--configs",
        nargs="+",
        type=cache_config,
        metavar="CONFIG",
        help="dense, S+R or S+R@text (default: dense, and 0 and 4 sinks in a cache of "
        f"the trained length, at most {DEFAULT_CAPACITY} tokens)",
    )
    add("--tokens", type=positive(), default=100_000, help="of a text (100000)")
    add(
        "--dense-tokens",
        type=positive(),
        help="of a text that dense reads (default: four times the trained length, "
        "8192 - 32768)",
    )
    add(
        "--streams",
        type=positive(),
        help="texts of each kind, the first of --tokens, the others of --dense-tokens "
        "(default: 8; 1 with --generate or --server)",
    )
    add("--every", type=positive(), default=10, help="lines between questions (10)")
    add("--distance", type=positive(), default=20, help="of the facts, in lines (20)")
    add(
        "--distances",
        nargs="+",
        type=positive(),
        metavar="LINES",
        help="of the sweep (default: from a tenth of the window to four windows)",
    )
    add(
        "--style",
        choices=list(STYLES),
        help="of the text (default: short for a vocabulary of bytes, else paper)",
    )
    add("--seed", type=int, default=0, help="of the first text (0)")
    add("--dtype", default="auto", help="of the weights, as vLLM takes it")
    add("--generate", action="store_true", help="decode the answers")
    add("--server", metavar="URL", help="ask it instead, such as http://host:8000/v1")
    add("--api", choices=["chat", "completions"], default="chat", help="of the server")
    add(
        "--reply-tokens",
        type=positive(),
        default=32,
        help="of the server's replies at most; a model that is no chat model goes on "
        "after its answer, for ever: give the answer's length (32)",
    )
    add("--quick", action="store_true", help="a smoke run: texts of 4,000 tokens")
    add("--name", default="stream_qa", help="of the files written (stream_qa)")
    add("--title", default="StreamEval: questions about a text that goes on")
    add("--output-dir", type=Path, default=Path("results"))
    add("--verbose", action="store_true", help="show vLLM's own log")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(tokens=4000, dense_tokens=2000, streams=1)
    args = parser.parse_args(argv)
    if "recompute" in map(str, args.configs or ()):
        parser.error("recompute is not offered by this evaluation")
    if args.streams is None:
        args.streams = 1 if args.generate or args.server else 8
    if args.model is None and args.server is None:
        args.model = str(ROOT / "models" / "pocket-sinks")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        result = evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in result.tables:
        print(f"\n{table.plain()}")
    print()
    for note in result.notes:
        print(note)
    file = result.write(args.output_dir)
    print(f"written: {file}", *result.plots, sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
