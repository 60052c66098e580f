"""Figures of what goes on inside of a policy and of how long its decisions take."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtvla.analysis.plots import COLOURS, HATCHES, INK, MARKERS, empty_figure, in_style, legend_above, new_figure
from dtvla.analysis.timings import TOTAL
from dtvla.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

LEAST_WEIGHT = 1e-4  # smaller attention weights are white


@in_style
def plot_pattern(matrices: "Mapping[str, np.ndarray]", parts: Mapping[str, slice]) -> "Figure":
    """Who sees whom, or how much: queries downwards, keys to the right, darker is more (by the logarithm).

    Args:
        matrices: title to (T, T), the mask or attention weights as numbers in [0, 1].
        parts: of :func:`dtvla.analysis.attention_map.segments`.
    """
    import numpy as np

    figure = empty_figure(4.4 * len(matrices), 4.4)
    middles = [(part.start + part.stop - 1) / 2 for part in parts.values()]
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axes, (title, matrix_TT) in zip(panels, matrices.items(), strict=True):
        shades = np.log10(np.clip(np.asarray(matrix_TT, float), LEAST_WEIGHT, 1.0))
        axes.imshow(shades, cmap="Greys", vmin=np.log10(LEAST_WEIGHT), vmax=0, interpolation="nearest")
        axes.set_xticks(middles, list(parts), rotation=30, ha="right")
        axes.tick_params(length=0)
        for part in list(parts.values())[:-1]:
            axes.axhline(part.stop - 0.5, color=COLOURS[2], linewidth=0.8)
            axes.axvline(part.stop - 0.5, color=COLOURS[2], linewidth=0.8)
        axes.set_xlabel("is seen")
        axes.set_title(title, loc="left")
        axes.spines[:].set_visible(True)
    panels[0].set_yticks(middles, list(parts))
    panels[0].set_ylabel("sees")
    return figure


@in_style
def plot_mass(mass: "pd.DataFrame") -> "Figure":
    """Attention by source as stacked bars, one for each layer, beside what even attention would give.

    Args:
        mass: of :func:`dtvla.analysis.attention_map.attention_mass`; decisions are averaged.
    """
    mean = mass.groupby(["query", "layer", "source"], sort=False)[["share", "even"]].mean().reset_index()
    sources, queries = list(dict.fromkeys(mean["source"])), list(dict.fromkeys(mean["query"]))
    layers = sorted(set(mean["layer"]))
    figure = empty_figure(7.0, 3.0)
    for axes, query in zip(figure.subplots(1, len(queries), sharey=True, squeeze=False)[0], queries, strict=True):
        rows = mean[mean["query"] == query]
        table = rows.pivot(index="layer", columns="source", values="share").loc[layers]
        table.loc["even"] = rows[rows["layer"] == layers[0]].set_index("source")["even"]
        bottom = 0.0 * table[sources[0]]
        for number, source in enumerate(sources):
            values = 100 * table[source]
            look = _area(number)
            axes.bar([*range(len(layers)), len(layers) + 0.5], values, 0.8, bottom=bottom, label=source, **look)
            bottom = bottom + values
        axes.set_xticks([*range(len(layers)), len(layers) + 0.5], [*(str(layer + 1) for layer in layers), "even"])
        axes.set_xlabel("layer")
        axes.set_title(f"{query.removesuffix('s')} tokens look at", loc="left")
        axes.set_ylim(0, 100)
    figure.axes[0].set_ylabel("attention, %")
    legend_above(figure, figure.axes[0])
    return figure


@in_style
def plot_sensitivity(moved: "pd.DataFrame") -> "Figure":
    """How far actions move with each change: a pale dot for each decision, a bar across for their mean.

    Args:
        moved: of :func:`dtvla.analysis.sensitivity.sensitivity`.
    """
    changes = list(dict.fromkeys(moved["change"]))
    labels = {"distance": "total variation of an action token", "shift": "move of the action, half ranges"}
    figure = empty_figure(7.2, 0.9 + 0.36 * len(changes))
    for axes, (column, label) in zip(figure.subplots(1, len(labels), sharey=True), labels.items(), strict=True):
        for place, change in enumerate(changes):
            values = moved.loc[moved["change"] == change, column]
            axes.plot(values, [place] * len(values), MARKERS[0], color=COLOURS[0], alpha=0.35, markersize=5)
            axes.plot([values.mean()] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=2.2)
        axes.set_yticks(range(len(changes)), changes)
        axes.set_ylim(len(changes) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    return figure


@in_style
def plot_phases(timings: "pd.DataFrame", sides: Sequence[str]) -> "Figure":
    """Phases of a decision as stacked bars, one for each side; a line marks what the device allows at least.

    Args:
        timings: of :func:`dtvla.analysis.timings.load_timings`, of one file and batch size.
        sides: which, from top to bottom.

    Raises:
        UserError: a side was not measured, or several times.
    """
    table = timings[timings["side"].isin(sides)]
    if set(table["side"]) != set(sides) or table.duplicated(["side", "phase"]).any():
        raise UserError(f"sides: found {', '.join(map(str, table['side'].unique()))}; choose one file, batch and sides")
    phases = [phase for phase in dict.fromkeys(table["phase"]) if phase != TOTAL]
    times = table.set_index(["side", "phase"])
    figure, axes = new_figure(6.4, 0.9 + 0.36 * len(sides))
    for place, side in enumerate(sides):
        left = 0.0
        for number, phase in enumerate(phases):
            width = times["median_ms"].get((side, phase), 0.0)
            look = _area(number)
            axes.barh(place, width, 0.7, left=left, label=phase if place == 0 else None, **look)
            left += width
        total, floor = times.loc[(side, TOTAL), ["median_ms", "floor_ms"]]
        axes.plot([floor, floor], [place - 0.42, place + 0.42], color=INK, linewidth=2.5)
        axes.annotate(f" {total:.0f} ms", (left, place), va="center", fontsize=8)
    axes.set_yticks(range(len(sides)), sides)
    axes.set_ylim(len(sides) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per decision, medians; black line: what the device allows")
    legend_above(figure, axes)
    return figure


@in_style
def plot_throughput(timings: "pd.DataFrame", sides: Sequence[str]) -> "Figure":
    """Decisions per second by batch size, a line for each side.

    Args:
        timings: of :func:`dtvla.analysis.timings.load_timings`, of one file.
        sides: which.
    """
    figure, axes = new_figure(5.2, 2.8)
    for number, side in enumerate(sides):
        rows = timings[(timings["side"] == side) & (timings["phase"] == TOTAL)].sort_values("batch_size")
        axes.plot(rows["batch_size"], rows["decisions_per_s"], f"-{MARKERS[number]}", color=COLOURS[number], label=side)
    axes.set_xticks(sorted(set(timings["batch_size"])))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("decisions per second")
    axes.grid(alpha=0.3, linewidth=0.6)
    legend_above(figure, axes)
    return figure


@in_style
def plot_moments(pictures: "Sequence[np.ndarray]", captions: Sequence[str], columns: int = 3) -> "Figure":
    """Pictures with a few words below each.

    Args:
        pictures: uint8 (H, W, 3) each.
        captions: one for each.
        columns: pictures in a row.
    """
    rows = -(-len(pictures) // columns)
    figure = empty_figure(2.1 * columns, 2.9 * rows)
    for axes, picture, caption in zip(
        figure.subplots(rows, columns, squeeze=False).flat, pictures, captions, strict=False
    ):
        axes.imshow(picture)
        axes.set_xlabel("\n".join(textwrap.wrap(caption, 36)), fontsize=7, loc="left")
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure


def _area(number: int) -> dict[str, Any]:
    """How the area of a part looks, by its place."""
    return {"facecolor": COLOURS[number] + "B0", "edgecolor": INK, "hatch": HATCHES[number]}
