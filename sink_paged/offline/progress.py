# SPDX-License-Identifier: Apache-2.0
"""What the user sees of a run on stderr: messages, and a progress bar with counts."""

from __future__ import annotations

import sys

from tqdm import tqdm

from sink_paged.offline.lines import Done, Failure, Outcome, Result


def report(message: str) -> None:
    """Write a line to stderr without tearing the progress bar."""
    # A lone surrogate, which JSON can hold, has no UTF-8.
    tqdm.write(message.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


class Tally:
    """Counts of a run, shown on the progress bar.

    Attributes:
        finished: streams that this run finished.
        failed: lines that could not be run.
        skipped: lines that an earlier run finished.
        tokens: tokens that the finished streams read and wrote.
    """

    def __init__(self, bar: tqdm) -> None:
        """Count from zero; ``bar`` advances by lines."""
        self.bar = bar
        self.finished = self.failed = self.skipped = self.tokens = 0

    def count(self, outcome: Outcome) -> None:
        """Count one line."""
        match outcome:
            case Result():
                self.finished += 1
                self.tokens += outcome.prompt_tokens + len(outcome.token_ids)
            case Failure():
                self.failed += 1
            case Done():
                self.skipped += 1

    def show(self) -> None:
        """Bring the bar up to date; to be called often, also without news."""
        rate = self.tokens / max(1e-9, self.bar.format_dict["elapsed"])
        self.bar.set_postfix_str(
            f"{rate:.0f} tokens/s, {self.failed} failed", refresh=False
        )
        self.bar.update(self.finished + self.failed + self.skipped - self.bar.n)
