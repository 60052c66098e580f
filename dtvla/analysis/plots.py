"""Figures of measured frames that read well in print, in grey, and for colour-blind readers.

Every arm has a colour of Okabe and Ito's palette, a marker, a line style and a hatch of its own, in the order in which
it appears, so that no reader needs the colour. Figures are matplotlib's own: change what you like, then
:func:`save_figure` writes PDF, SVG and PNG.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# M. Okabe, K. Ito, "Color Universal Design" (2008), ordered so that neighbours differ in grey, too
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 4)))
FORMATS = ("pdf", "svg", "png")
GREY, INK = "#666666", "#222222"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # letters stay letters
    "svg.hashsalt": "dtvla",  # the same figure is the same file
    "savefig.dpi": 200,
}


def _styled[**P](draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """Draw with the style of this module, whatever the notebook has set."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@dataclass(frozen=True)
class ArmStyle:
    """How an arm looks in all figures: a colour, a marker, a hatch of its areas and a style of its lines."""

    colour: str
    marker: str
    hatch: str
    line: Any


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """A look for each arm, by its place.

    Raises:
        UserError: more arms than looks that can be told apart.
    """
    if len(arms) > len(COLOURS):
        raise UserError(f"arms: found {len(arms)}; a figure shows {len(COLOURS)} at most; choose among them")
    looks = map(ArmStyle, COLOURS, MARKERS, HATCHES, LINES)
    return dict(zip(arms, looks, strict=False))


@_styled
def plot_success(rates: "pd.DataFrame", within: str | None = None) -> "Figure":
    """Success of each arm as a bar with its interval, in percent.

    Args:
        rates: of :func:`dtvla.analysis.ablation.success`, grouped by ``arm``, and by `within` if given.
        within: column whose values make groups of bars, e.g. ``suite``.
    """
    groups = [None] if within is None else list(dict.fromkeys(rates[within]))
    styles = arm_styles(_arms(rates))
    width = 0.82 / len(styles)
    figure, axes = _figure(max(3.2, 1.2 + 0.55 * len(groups) * len(styles)), 3.0)
    for number, (arm, style) in enumerate(styles.items()):
        rows = rates[rates["arm"] == arm]
        rows = rows if within is None else rows.set_index(within).reindex(groups)
        places = [g + (number - (len(styles) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(
            places,
            100 * rows["rate"],
            0.92 * width,
            yerr=_errors(rows).T,
            label=arm,
            facecolor=style.colour + "B0",
            edgecolor=INK,
            hatch=style.hatch,
            error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": INK},
        )
        for place, rate, high in zip(places, rows["rate"], rows["high"], strict=True):
            if isfinite(rate):
                axes.annotate(
                    f"{100 * rate:.1f}",
                    (place, 100 * high),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                )
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("success, %, with 95 % interval")
    axes.set_xticks(range(len(groups)), ["" if g is None else str(g) for g in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    _legend(figure, axes)
    return figure


@_styled
def plot_tasks(rates: "pd.DataFrame") -> "Figure":
    """Success of each arm in each task as a dot with its interval, in percent, a row for each task.

    Args:
        rates: of :func:`dtvla.analysis.ablation.success`, grouped by ``arm``, ``suite``, ``task_id`` and ``task``.
    """
    tasks = list(dict.fromkeys(zip(rates["suite"], rates["task_id"], rates["task"], strict=True)))
    styles = arm_styles(_arms(rates))
    figure, axes = _figure(7.0, 1.0 + (0.22 + 0.11 * len(styles)) * len(tasks))
    places = {task[:2]: place for place, task in enumerate(tasks)}
    for number, (arm, style) in enumerate(styles.items()):
        rows = rates[rates["arm"] == arm]
        shift = (number - (len(styles) - 1) / 2) * 0.64 / len(styles)
        heights = [places[key] + shift for key in zip(rows["suite"], rows["task_id"], strict=True)]
        axes.errorbar(
            100 * rows["rate"],
            heights,
            xerr=_errors(rows).T,
            fmt=style.marker,
            color=style.colour,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            markersize=5.5,
            elinewidth=1.0,
            label=arm,
        )
    suites = {suite for suite, _, _ in tasks}
    names = [
        f"{number}: {words}" if len(suites) == 1 else f"{suite} {number}: {words}" for suite, number, words in tasks
    ]
    axes.set_yticks(range(len(tasks)), [_wrapped(name, 44) for name in names], fontsize=8)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("success, %, with 95 % interval")
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    for place in range(1, len(tasks)):
        axes.axhline(place - 0.5, color=GREY, alpha=0.2, linewidth=0.5)
    _legend(figure, axes)
    return figure


@_styled
def plot_differences(compared: "pd.DataFrame", arms: Sequence[str] = ()) -> "Figure":
    """Differences from the baseline with their intervals, in percentage points; filled where Holm's p is below 0.05.

    Args:
        compared: of :func:`dtvla.analysis.ablation.compare_arms`.
        arms: all arms in the order of the other figures, so that they look the same here; none: the baseline first.
    """
    parts = list(compared.columns[: list(compared.columns).index("arm")])
    styles = arm_styles(list(dict.fromkeys([*arms, compared["baseline"].iloc[0], *_arms(compared)])))
    figure, axes = _figure(5.6, 1.0 + 0.36 * len(compared))
    names = []
    for place, row in enumerate(compared.to_dict("records")):
        style = styles[row["arm"]]
        value, low, high = (100 * row[name] for name in ("difference", "low", "high"))
        axes.errorbar(
            value,
            place,
            xerr=[[value - low], [high - value]],
            fmt=style.marker,
            color=style.colour,
            markerfacecolor=style.colour if row["p_holm"] < 0.05 else "white",
            markeredgecolor=INK,
            markersize=7,
            elinewidth=1.4,
            capsize=3,
        )
        names.append(", ".join([*(str(row[part]) for part in parts), row["arm"]]))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [_wrapped(name, 40) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("difference, percentage points")
    _note(axes, f"against {compared['baseline'].iloc[0]}; 95 % intervals; filled: p < 0.05 after Holm's correction")
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    return figure


@_styled
def plot_latency(decisions: "pd.DataFrame") -> "Figure":
    """How long decisions took: a box from quartile to quartile for each arm, whiskers to the 1st and 99th percentile.

    Args:
        decisions: of :func:`dtvla.analysis.frames.decision_frame`.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    timed = decisions[decisions["latency_ms"].notna()]
    if timed.empty:
        raise UserError("latency: no decision was timed; evaluate with this dtvla")
    styles = arm_styles(_arms(timed))
    times = [timed.loc[timed["arm"] == arm, "latency_ms"].to_numpy() for arm in styles]
    figure, axes = _figure(5.6, 1.0 + 0.42 * len(styles))
    boxes = axes.boxplot(
        times,
        orientation="horizontal",
        whis=(1, 99),
        widths=0.6,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": INK, "linewidth": 2},
    )
    for box, style in zip(boxes["boxes"], styles.values(), strict=True):
        box.set(facecolor=style.colour + "B0", edgecolor=INK, hatch=style.hatch)
    for place, values in enumerate(times, start=1):
        middle = float(sorted(values)[len(values) // 2])
        axes.annotate(f"{middle:.3g} ms", (middle, place - 0.42), ha="center", fontsize=7.5)
    axes.set_yticks(range(1, len(styles) + 1), [_wrapped(arm, 40) for arm in styles])
    axes.invert_yaxis()
    low, high = timed["latency_ms"].quantile([0.01, 0.99])
    if high > 10 * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("ms per decision")
    _note(axes, "median, quartiles, 1st and 99th percentile")
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    return figure


@_styled
def plot_over_time(course: "pd.DataFrame", unit: str = "tokens of a thought") -> "Figure":
    """A number of the decisions during the episode: the mean as a line, between the quartiles a pale band.

    Args:
        course: of :func:`dtvla.analysis.thinking.over_time`, grouped by ``arm``.
        unit: what is drawn, for the axis.
    """
    styles = arm_styles(_arms(course))
    figure, axes = _figure(5.6, 3.0)
    for arm, style in styles.items():
        rows = course[course["arm"] == arm]
        axes.plot(
            rows["step"],
            rows["mean"],
            linestyle=style.line,
            color=style.colour,
            marker=style.marker,
            markersize=4.5,
            markevery=max(1, len(rows) // 12),
            linewidth=1.6,
            label=arm,
        )
        axes.fill_between(rows["step"], rows["low"], rows["high"], color=style.colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("policy step of the episode")
    axes.set_ylabel(f"{unit}, mean and quartiles")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, linewidth=0.6)
    _legend(figure, axes)
    return figure


def save_figure(figure: "Figure", stem: Path | str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write ``<stem>.pdf``, ``<stem>.svg`` and ``<stem>.png``, each atomically; the same figure gives the same bytes.

    Returns:
        The files, in the order of `formats`.

    Raises:
        UserError: an unknown format, or the folder cannot be written.
    """
    from matplotlib import rc_context

    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UserError(f"formats: found {unknown[0]}; use some of {', '.join(FORMATS)}")
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    written = []
    for name in formats:
        path = Path(f"{stem}.{name}").expanduser()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with rc_context(_STYLE):
                figure.savefig(temporary, format=name, metadata=undated[name])
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(
                f"output: {path} cannot be written ({error.strerror}); free space or choose another folder"
            ) from error
        written.append(path)
    return written


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of so many inches that needs no display and leaves no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _arms(frame: "pd.DataFrame") -> list[str]:
    return list(dict.fromkeys(frame["arm"]))


def _errors(rows: "pd.DataFrame") -> Any:
    """Percentage points (N, 2) from the rate down to the lower and up to the upper end of its interval."""
    import numpy as np

    return 100 * np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]], axis=1).clip(min=0)


def _legend(figure: "Figure", axes: "Axes") -> None:
    """The arms above the plot, as many in a row as there is room for; what they need is added to the height."""
    handles, labels = axes.get_legend_handles_labels()
    letters = int(15 * figure.get_figwidth())  # of 8 points; a handle with its gaps takes the room of ten
    columns = max(1, min(len(labels), letters // (max(map(len, labels)) + 10)))
    words = [_wrapped(label, letters - 10) for label in labels]
    lines = sum(text.count("\n") + 1 for text in words) / columns
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    figure.legend(handles, words, loc="outside upper left", ncols=columns, handlelength=3.2)


def _note(axes: "Axes", text: str) -> None:
    """How to read the plot, above its right end."""
    axes.set_title(_wrapped(text, 64), fontsize=8, color=GREY, loc="right")


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text
