# SPDX-License-Identifier: Apache-2.0
"""What result files say of their making."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sink_paged

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from provenance import provenance, revision, without_folders  # noqa: E402

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *identity, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_git
def test_revision_is_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the working directory; tags do not change its form."""
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    git(repository, "init")
    file = repository / "scripts" / "a.py"
    file.write_text("1\n")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "first")
    git(repository, "tag", "-a", "v1", "-m", "v1")
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    assert revision(file.parent) == commit
    file.write_text("2\n")
    assert revision(file.parent) == f"{commit}-dirty"


def test_revision_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision(tmp_path) is None


def test_revision_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision(SCRIPTS) is None


def test_no_paths_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--output-dir", "/home/a/out", "--model=/home/a/llama"]
    monkeypatch.setattr(sys, "argv", ["/home/a/scripts/bench_turns.py", *arguments])
    made = provenance()
    assert made["script"] == "bench_turns.py"
    assert made["argv"] == ["--quick", "--output-dir", "out", "--model=llama"]
    assert made["sink_paged"] == sink_paged.__version__


@pytest.mark.parametrize("argument", ["models/pocket", "--eager", "--a=b/c", "4+60"])
def test_other_arguments_stay(argument: str) -> None:
    assert without_folders(argument) == argument
