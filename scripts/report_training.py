#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Do sinks form in training? The logs of training runs as a section of RESULTS.md.

python scripts/report_training.py models/*/training.json results/training/*.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from provenance import provenance

from sink_paged.evaluation.report import (
    Cell,
    Evaluation,
    Table,
    new_axes,
    save_figure,
)


def run_name(file: Path) -> str:
    """The name of a file, but that of the model's folder for its ``training.json``."""
    return file.parent.name if file.name == "training.json" else file.stem


def row(name: str, record: dict[str, Any]) -> list[Cell]:
    """A run's last figures; None for what its script did not record."""
    last = record["log"][-1]
    shares = last.get("first_token_share")
    without = last.get("without_prefix")
    return [
        name,
        last["step"] * record["tokens_per_step"],
        last["held_out_loss"],
        None if without is None else without - last["held_out_loss"],
        None if shares is None else max(shares),
    ]


def note(name: str, record: dict[str, Any]) -> str:
    """How a run was made; its ``note``, which is written by hand, comes last."""
    commands = ", then ".join(f"`{command}`" for command in record["commands"])
    return f"{name}: {commands}. {record.get('note', '')}".strip()


def plot(records: dict[str, dict[str, Any]]) -> Any:
    """Held-out loss, and the largest layer's share of the first token."""
    figure, axes = new_axes(columns=2, width=5.0)
    left, right = axes[0]
    for name, record in records.items():
        log, step = record["log"], record["tokens_per_step"] / 1e6
        left.plot(
            [e["step"] * step for e in log],
            [e["held_out_loss"] for e in log],
            label=name,
        )
        measured = [e for e in log if "first_token_share" in e]
        right.plot(
            [e["step"] * step for e in measured],
            [max(e["first_token_share"]) for e in measured],
            marker=".",
            label=name,
        )
    left.set_ylabel("held-out loss (nats per byte)")
    right.set_ylabel("attention on the first token, largest layer")
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.set_xlabel("million tokens trained on")
    left.legend(fontsize=8)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="training.json files")
    parser.add_argument("--output-dir", type=Path, default=Path("results"))
    args = parser.parse_args()
    records = {run_name(file): json.loads(file.read_text()) for file in args.records}
    columns = [
        "run",
        "tokens",
        "held-out loss",
        "more without BOS",
        "first token's share",
    ]
    evaluation = Evaluation(
        name="training",
        title="Do sinks form in training?",
        summary=(
            "Each run's last evaluation, on text never trained on. A model with sinks "
            "loses much without the BOS token, and a layer gives that token a large "
            "share of its attention. Both are of the second half of the context."
        ),
        command=shlex.join(["python", *sys.argv]),
        provenance=provenance(),
        tables=[Table("Runs", columns, [row(*item) for item in records.items()])],
        plots=[save_figure(plot(records), args.output_dir, "training")],
        notes=[note(*item) for item in records.items()],
    )
    evaluation.write(args.output_dir)
    print(evaluation.tables[0].plain())
    return 0


if __name__ == "__main__":
    sys.exit(main())
