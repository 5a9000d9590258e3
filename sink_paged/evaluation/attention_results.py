# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and figures of the attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sink_paged.evaluation.attention_maps import FIRST, PARTS, Array
from sink_paged.evaluation.report import Table, new_axes, save_figure


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


def draw_logits(found: Findings, settings: dict[str, Any], file: Path) -> str:
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
    return save_figure(figure, file.parent, file.name)


def drawn_maps(found: Findings, layer: int) -> dict[str, Array]:
    """The maps of a layer that are drawn."""
    maps = found.logits[layer]
    heads = {f"head {head}": maps[head] for head in found.heads}
    return {"mean of heads": maps.mean(axis=0)} | heads


def draw_shares(found: Findings, settings: dict[str, Any], file: Path) -> str:
    """Shares over the query's position: a panel a layer, the legend below."""
    columns = min(4, len(found.layers))
    rows = -(-len(found.layers) // columns)
    figure, axes = new_axes(columns, rows)
    figure.set_size_inches(max(8.0, 3.4 * columns), 2.8 * rows + 1.0)
    for axis, layer in zip(axes.flat, found.layers, strict=False):
        draw_layer(axis, found, layer, settings["trained_length"])
    for axis in axes.flat[len(found.layers) :]:
        axis.remove()
    # The empty line is where the legend stands.
    figure.supxlabel("position of the query\n\n", fontsize=10)
    figure.supylabel("share of attention", fontsize=10)
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=len(names), fontsize=8)
    heads = ", ".join(map(str, found.heads))
    figure.suptitle(
        f"{model_name(settings)}: share of attention, mean of all heads (thick lines), "
        f"heads {heads} (thin)",
        fontsize=10,
    )
    return save_figure(figure, file.parent, file.name)


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
