# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves: a JSON file, plots beside it, tables on the terminal.

``RESULTS.md`` is put together from such files by ``scripts/write_results.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

Cell = str | int | float | None


@dataclass
class Table:
    """A table of a result.

    Attributes:
        title: one line.
        columns: their heads.
        rows: of as many cells each; None where nothing was measured.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]

    def texts(self) -> list[list[str]]:
        """All cells as they are shown, the heads first."""
        return [self.columns] + [
            [format_cell(cell) for cell in row] for row in self.rows
        ]

    def plain(self) -> str:
        """For a terminal: the first column left, the others right."""
        texts = self.texts()
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = [self.title]
        for first, *others in texts:
            cells = [first.ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """For a document."""
        head, *rows = self.texts()
        rule = ["---"] + ["---:"] * (len(head) - 1)
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines)


@dataclass
class Evaluation:
    """One run of an evaluation script.

    Attributes:
        name: of its files.
        title: its head in ``RESULTS.md``.
        summary: what was done, in a few sentences.
        command: what made it.
        provenance: versions, revision, hardware.
        seconds: that it took.
        tables: its figures.
        plots: files in the same folder.
        notes: what a reader must know beside the tables, a sentence or two each.
        data: figures that the tables do not show.
    """

    name: str
    title: str
    summary: str
    command: str
    provenance: dict[str, Any]
    seconds: float = 0.0
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write ``<name>.json`` into ``folder``, where the plots are."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.json"
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return file

    @classmethod
    def read(cls, file: Path) -> Self:
        """What ``write`` wrote."""
        fields = json.loads(file.read_text())
        fields["tables"] = [Table(**table) for table in fields["tables"]]
        return cls(**fields)


def format_cell(cell: Cell) -> str:
    """Numbers with three or four digits that say something."""
    if cell is None:
        return "-"
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    size = abs(cell)
    if size >= 1e5:
        return f"{cell:.2e}"
    if size >= 1000:
        return f"{cell:,.0f}"
    return (
        f"{cell:.1f}" if size >= 100 else f"{cell:.3f}" if size < 10 else f"{cell:.2f}"
    )


def save_figure(figure: Any, folder: Path, name: str) -> str:
    """Write a figure of matplotlib into ``folder``; the file's name there."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return f"{name}.png"


def new_axes(columns: int = 1, rows: int = 1, width: float = 6.4) -> tuple[Any, Any]:
    """A figure and its axes ``[rows, columns]``, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(width * columns, 4.0 * rows))
    return figure, figure.subplots(rows, columns, squeeze=False)


def geometric_bins(length: int, first: int, per_doubling: int = 6) -> Sequence[int]:
    """Edges of bins ``[0, first, ..., length]`` that grow, for a logarithmic axis."""
    edges = [0, min(first, length)]
    while edges[-1] < length:
        grown = max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / per_doubling)))
        edges.append(min(grown, length))
    return edges
