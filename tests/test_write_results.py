# SPDX-License-Identifier: Apache-2.0
"""RESULTS.md from the files of runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sink_paged.evaluation.report import Evaluation, Table

SCRIPT = Path(__file__).parents[1] / "scripts" / "write_results.py"
MADE = {
    "git_revision": "0123456789abcdef",
    "vllm": "0.32.0",
    "torch": "2.13.0",
    "gpu": None,
    "cpu": "a CPU",
    "cpus": 2,
}


def make(name: str, title: str) -> Evaluation:
    table = Table("Perplexity", ["config", "all"], [["4+60", 1.2345], ["dense", None]])
    return Evaluation(
        name, title, "What was done.", f"python {name}.py", MADE, 12.3,
        tables=[table], plots=[f"{name}.png"], notes=["A note."],
    )  # fmt: skip


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_sections(tmp_path: Path) -> None:
    """In their order, figures as measured, the paper's marked as its own."""
    folder, output = tmp_path / "results", tmp_path / "RESULTS.md"
    for name, title in (
        ("zeta", "Last"),
        ("ablation", "Second"),
        ("perplexity", "1st"),
    ):
        make(name, title).write(folder)
    ran = run("--results", folder, "--output", output)
    assert ran.returncode == 0 and "3 runs" in ran.stdout
    text = output.read_text()
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## 1st", "## Second", "## Last"]
    assert text.count("| 4+60 | 1.234 |") + text.count("| 4+60 | 1.235 |") == 3
    assert text.count("| dense | - |") == 3
    assert "![1st](results/perplexity.png)" in text
    assert "`python ablation.py`" in text and "2 cores of a CPU" in text
    published = "| Llama-2-7B | 4,096 | 3,360 | 11.88 | 10.51 | 9.590 | 9.540 |"
    assert text.count(published) == 1
    assert text.index(published) < text.index("## Second")
    assert "Other models, published" in text


def test_nothing_to_write(tmp_path: Path) -> None:
    ran = run("--results", tmp_path, "--output", tmp_path / "RESULTS.md")
    assert ran.returncode == 2 and "make results" in ran.stderr
    assert not (tmp_path / "RESULTS.md").exists()


def test_logs_of_training_runs(tmp_path: Path) -> None:
    """What a run's script did not record stays empty."""
    entry = {"step": 10, "held_out_loss": 1.5}
    record = {"commands": ["python a.py"], "tokens_per_step": 100, "log": [entry]}
    (tmp_path / "old.json").write_text(json.dumps(record))
    entry |= {"without_prefix": 1.75, "first_token_share": [0.1, 0.5]}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "training.json").write_text(json.dumps(record))
    script = SCRIPT.with_name("report_training.py")
    files = [str(tmp_path / name) for name in ("old.json", "new/training.json")]
    command = [sys.executable, script, *files, "--output-dir", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    evaluation = Evaluation.read(tmp_path / "out" / "training.json")
    rows = [["old", 1000, 1.5, None, None], ["new", 1000, 1.5, 0.25, 0.5]]
    assert evaluation.tables[0].rows == rows
    assert (tmp_path / "out" / "training.png").stat().st_size > 5000
