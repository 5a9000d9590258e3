# SPDX-License-Identifier: Apache-2.0
"""The support table of the README: recorded by the family tests, rendered here.

A family test is marked ``family`` and parametrised with the family's name as its id.
It calls ``record`` or ``record_refusal``. With ``SINK_PAGED_RECORD=1`` (``make
support``) these write ``data/support.json``; else they check that what is written there
still holds. ``python -m tests.support`` renders the table into the README.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "data" / "support.json"
README = ROOT / "README.md"
BEGIN = "<!-- support table: rendered by `make support` -->\n"
END = "<!-- end of the support table -->\n"
RECORDING = bool(os.environ.get("SINK_PAGED_RECORD"))


def load() -> dict[str, dict[str, Any]]:
    """``{"supported": {family: row}, "refused": {family: row}}``."""
    if not RESULTS.exists():
        return {"supported": {}, "refused": {}}
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return results


def record(family: str, scheme: str, error: float) -> None:
    """Note that a family ran exactly through the real engine.

    Args:
        family: row of the table, the id of the calling test's case.
        scheme: its positions, in a few words.
        error: largest difference of a token's loss from the oracle, in nats.
    """
    results = load()
    if RECORDING:
        row = results["supported"].setdefault(family, {"vllm": {}})
        row["scheme"] = scheme
        row["vllm"][vllm.__version__] = {
            "error": float(f"{error:.1e}"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        }
        _store(results)
    row = results["supported"].get(family)
    assert row is not None and row["scheme"] == scheme, "run `make support`"


def record_refusal(family: str, scheme: str, reason: str) -> None:
    """Note that a family is refused at start-up.

    Args:
        family: row of the table, the id of the calling test's case.
        scheme: its positions, in a few words.
        reason: from the message that a user sees.
    """
    results = load()
    row = {"scheme": scheme, "reason": reason}
    if RECORDING:
        results["refused"][family] = row
        _store(results)
    assert results["refused"].get(family) == row, "run `make support`"


def _store(results: dict[str, dict[str, Any]]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def render(results: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| family | positions | largest loss difference, nats | vLLM |",
        "|---|---|---|---|",
    ]
    for family, row in sorted(results["supported"].items(), key=_order):
        versions = sorted(row["vllm"], key=lambda v: [int(n) for n in v.split(".")[:3]])
        error = max(run["error"] for run in row["vllm"].values())
        lines.append(
            f"| {family} | {row['scheme']} | {error:.1e} | {', '.join(versions)} |"
        )
    lines += [
        "",
        "| refused at start-up | positions | reason |",
        "|---|---|---|",
    ]
    lines += [
        f"| {family} | {row['scheme']} | {row['reason']} |"
        for family, row in sorted(results["refused"].items(), key=_order)
    ]
    return "\n".join(lines) + "\n"


def _order(row: tuple[str, Any]) -> str:
    return row[0].casefold()


def table_in(readme: str) -> str:
    """What stands between the markers."""
    return readme.partition(BEGIN)[2].partition(END)[0]


def tested_families() -> list[str]:
    """Ids of the tests marked ``family``, of all files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "family"]
    done = subprocess.run(
        [*command, str(ROOT / "tests")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    nodes = [line for line in done.stdout.splitlines() if "::" in line]
    return [node.partition("[")[2].removesuffix("]") for node in nodes]


def main() -> None:
    """Drop the rows of families that no test stands for, and render the README."""
    results, tested = load(), tested_families()
    for rows in results.values():
        for family in set(rows) - set(tested):
            del rows[family]
    _store(results)
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + render(results) + END + after)


if __name__ == "__main__":
    main()
