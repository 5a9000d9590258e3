#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write RESULTS.md from what the evaluation scripts left in ``results/``.

Nothing is measured here: every figure is copied from the JSON file of the run that made
it, with its command. The paper's figures stand beside them, marked as its own.

    make results            # runs the evaluations, then this
    python scripts/write_results.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sink_paged.evaluation.paper import SINK_COUNTS, SINK_TOKEN
from sink_paged.evaluation.report import Evaluation, Table

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED: dict[str, list[Table]] = {
    "perplexity": [SINK_COUNTS],
    "sink_token": [SINK_TOKEN],
}
"""The paper's tables, by the run that they belong beside."""
ORDER = (
    "perplexity",
    "ablation",
    "sink_token",
    "long_context",
    "attention_maps",
    "attention_maps_sink_token",
    "stream_qa",
    "training",
)
"""Of the sections, by the names of the runs; others follow."""
HEAD = """\
# Results

Written by `scripts/write_results.py` from the files in `{folder}`; `make results` makes
those anew. Models, texts and commands are named with each table. They are small models
trained by `scripts/train_pocket_model.py`: the shapes of the curves are the point, not
their levels. Tables headed "other models, published" are the StreamingLLM paper's.
"""


def section(evaluation: Evaluation, folder: str) -> Iterator[str]:
    """Lines of one run's section."""
    yield f"## {evaluation.title}"
    yield evaluation.summary
    for table in evaluation.tables + PUBLISHED.get(evaluation.name, []):
        yield table.markdown()
    for plot in evaluation.plots:
        yield f"![{evaluation.title}]({folder}/{plot})"
    yield from evaluation.notes
    made = evaluation.provenance
    where = made.get("gpu") or f"{made['cpus']} cores of {made['cpu']}"
    commit, *dirty = (made["git_revision"] or "unknown").split("-")
    revision = "-".join([commit[:12], *dirty])
    yield (
        f"`{evaluation.command}`\n\n{evaluation.seconds:,.0f} s on {where}; vLLM "
        f"{made['vllm']}, torch {made['torch']}, revision {revision}."
    )


def write(folder: Path, output: Path) -> int:
    """Write ``output``; the number of runs in it."""
    files = sorted(folder.glob("*.json"))
    runs = [Evaluation.read(file) for file in files]
    names = [*ORDER, *sorted(run.name for run in runs)]
    runs.sort(key=lambda run: names.index(run.name))
    place = Path(os.path.relpath(folder, output.parent)).as_posix()
    parts = [HEAD.format(folder=f"{place}/")]
    for run in runs:
        parts += section(run, place)
    output.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return len(runs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "RESULTS.md")
    args = parser.parse_args()
    if not any(args.results.glob("*.json")):
        print(f"error: no result in {args.results}: run make results", file=sys.stderr)
        return 2
    print(f"{args.output}: {write(args.results, args.output)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
