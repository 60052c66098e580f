"""Figures of measured frames that read well in print, in grey, and for colour-blind readers.

Every arm has a colour of Okabe and Ito's palette, a marker, a line style and a hatch of its own, in the order in which
it appears, so that no reader needs the colour. Figures are matplotlib's own: change what you like, then
:func:`save_figure` writes PDF, SVG and PNG.
"""

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.tables import printable
from dtvla.errors import UserError
from dtvla.rollout.results import write_bytes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

# M. Okabe, K. Ito, "Color Universal Design" (2008), ordered so that neighbours differ in grey, too
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "|||", "\\\\\\", "xxx", "---", "o", "+++")  # dots make large files: each is eight curves
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 4)))
FORMATS = ("pdf", "svg", "png")
GREY, INK = "#666666", "#222222"
LINE = 0.135  # inches from line to line of 8 points
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # letters stay letters
    "svg.hashsalt": "dtvla",  # the same figure is the same file
    "savefig.dpi": 200,
    "text.parse_math": False,  # names of arms and tasks are text
}


def in_style[**P](draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
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

    @property
    def area(self) -> dict[str, Any]:
        """Settings of bars and boxes."""
        return {"facecolor": self.colour + "B0", "edgecolor": INK, "hatch": self.hatch}

    @property
    def dots(self) -> dict[str, Any]:
        """Settings of dots with intervals."""
        edge = {"markeredgecolor": INK, "markeredgewidth": 0.6}
        return {"fmt": self.marker, "color": self.colour, "markersize": 6, "elinewidth": 1.1, **edge}


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """A look for each arm, by its place; from the ninth on, colours come again with the marker of another."""
    count = len(COLOURS)
    shifted = [(place, (place + place // count) % count) for place in range(len(arms))]
    looks = (ArmStyle(COLOURS[place % count], MARKERS[k], HATCHES[k], LINES[k]) for place, k in shifted)
    return dict(zip(arms, looks, strict=True))


@in_style
def plot_success(rates: "pd.DataFrame", within: str | None = None) -> "Figure":
    """Success of each arm as a bar with its interval, in percent.

    Args:
        rates: of :func:`dtvla.analysis.ablation.success`, grouped by ``arm``, and by `within` if given.
        within: column whose values make groups of bars, e.g. ``suite``.
    """
    groups = [None] if within is None else list(dict.fromkeys(rates[within]))
    styles = arm_styles(_arms(rates))
    width = 0.82 / len(styles)
    figure, axes = new_figure(max(3.2, 1.2 + 0.55 * len(groups) * len(styles)), 3.0)
    for number, (arm, style) in enumerate(styles.items()):
        rows = rates[rates["arm"] == arm]
        rows = rows if within is None else rows.set_index(within).reindex(groups)
        places = [g + (number - (len(styles) - 1) / 2) * width for g in range(len(groups))]
        errors = {"yerr": _errors(rows), "error_kw": {"elinewidth": 1.1, "ecolor": INK}}
        axes.bar(places, 100 * rows["rate"], 0.92 * width, label=arm, **errors, **style.area)
        for place, rate, high in zip(places, rows["rate"], rows["high"], strict=True):
            if isfinite(rate):
                above: Any = {"textcoords": "offset points", "xytext": (0, 3), "ha": "center"}
                axes.annotate(f"{100 * rate:.1f}", (place, 100 * high), fontsize=7.5, **above)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("success, %, with 95 % interval")
    axes.set_xticks(range(len(groups)), ["" if g is None else printable(str(g)) for g in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    legend_above(figure, axes)
    return figure


@in_style
def plot_tasks(rates: "pd.DataFrame") -> "Figure":
    """Success of each arm in each task as a dot with its interval, in percent, a row for each task.

    Args:
        rates: of :func:`dtvla.analysis.ablation.success`, grouped by ``arm``, ``suite``, ``task_id`` and ``task``.
    """
    tasks = list(dict.fromkeys(zip(rates["suite"], rates["task_id"], rates["task"], strict=True)))
    one_suite = rates["suite"].nunique() == 1
    styles = arm_styles(_arms(rates))
    figure, axes = new_figure(4.4, 1.0 + (0.22 + 0.11 * len(styles)) * len(tasks))
    places = {task[:2]: place for place, task in enumerate(tasks)}
    for number, (arm, style) in enumerate(styles.items()):
        rows = rates[rates["arm"] == arm]
        shift = (number - (len(styles) - 1) / 2) * 0.64 / len(styles)
        heights = [places[key] + shift for key in zip(rows["suite"], rows["task_id"], strict=True)]
        axes.errorbar(100 * rows["rate"], heights, xerr=_errors(rows), label=arm, capsize=0, **style.dots)
    _name_rows(figure, axes, [f"{k}: {words}" if one_suite else f"{suite} {k}: {words}" for suite, k, words in tasks])
    axes.set_xlim(-3, 103)
    axes.set_xlabel("success, %, with 95 % interval")
    for place in range(1, len(tasks)):
        axes.axhline(place - 0.5, color=GREY, alpha=0.2, linewidth=0.5)
    legend_above(figure, axes)
    return figure


@in_style
def plot_differences(compared: "pd.DataFrame", arms: Sequence[str] = ()) -> "Figure":
    """Differences from the baseline with their intervals, in percentage points; filled where Holm's p is below 0.05.

    Args:
        compared: of :func:`dtvla.analysis.ablation.compare_arms`.
        arms: all arms in the order of the other figures, so that they look the same here; none: the baseline first.
    """
    parts = list(compared.columns[: list(compared.columns).index("arm")])
    baseline = compared["baseline"].iloc[0]
    styles = arm_styles(list(dict.fromkeys([*arms, baseline, *_arms(compared)])))
    figure, axes = new_figure(4.4, 1.0 + 0.36 * len(compared))
    errors = _errors(compared.assign(rate=compared["difference"]))
    for place, row in enumerate(compared.to_dict("records")):
        style = styles[row["arm"]]
        face = style.colour if row["p_holm"] < 0.05 else "white"
        ends = errors[:, [place]]
        axes.errorbar(100 * row["difference"], place, xerr=ends, markerfacecolor=face, **style.dots)
    axes.axvline(0, color=INK, linewidth=0.8)
    _name_rows(figure, axes, compared[[*parts, "arm"]].astype(str).agg(", ".join, axis=1))
    axes.set_xlabel("difference, percentage points")
    _note(figure, axes, f"against {baseline}; 95 % intervals; filled: p < 0.05 after Holm's correction")
    return figure


@in_style
def plot_latency(decisions: "pd.DataFrame") -> "Figure":
    """How long decisions took: a box from quartile to quartile for each arm, whiskers to the 1st and 99th percentile.

    Args:
        decisions: of :func:`dtvla.analysis.frames.decision_frame`.
    """
    timed = decisions[decisions["latency_ms"].notna()]
    if timed.empty:
        raise UserError("latency: no decision was timed; evaluate with this dtvla")
    styles = arm_styles(_arms(timed))
    times = [timed.loc[timed["arm"] == arm, "latency_ms"] for arm in styles]
    figure, axes = new_figure(4.4, 1.0 + 0.42 * len(styles))
    shape: Any = {"whis": (1, 99), "widths": 0.6, "showfliers": False, "patch_artist": True}
    middle = {"color": INK, "linewidth": 2}
    boxes = axes.boxplot(times, positions=range(len(times)), orientation="horizontal", medianprops=middle, **shape)
    for box, style in zip(boxes["boxes"], styles.values(), strict=True):
        box.set(**style.area)
    for place, values in enumerate(times):
        axes.annotate(f"{values.median():.3g} ms", (values.median(), place - 0.42), ha="center", fontsize=7.5)
    _name_rows(figure, axes, styles)
    axes.set_ylim(top=-0.8)  # room for the first median
    low, high = timed["latency_ms"].quantile([0.01, 0.99])
    if high > 10 * low > 0:
        logarithmic(axes.xaxis)
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("ms per decision")
    _note(figure, axes, "median, quartiles, 1st and 99th percentile")
    return figure


@in_style
def plot_over_time(course: "pd.DataFrame", unit: str = "tokens of a thought") -> "Figure":
    """A number of the decisions during the episode: the mean as a line, between the quartiles a pale band.

    Args:
        course: of :func:`dtvla.analysis.thinking.over_time`, grouped by ``arm``.
        unit: what is drawn, for the axis.
    """
    styles = arm_styles(_arms(course))
    figure, axes = new_figure(4.4, 3.0)
    for arm, style in styles.items():
        rows = course[course["arm"] == arm]
        axes.plot(
            rows["step"],
            rows["mean"],
            linestyle=style.line,
            color=style.colour,
            marker=style.marker,
            markersize=4.5,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            markevery=max(1, len(rows) // 12),
            linewidth=1.6,
            label=arm,
        )
        axes.fill_between(rows["step"], rows["low"], rows["high"], color=style.colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("policy step of the episode")
    axes.set_ylabel(f"{unit}, mean and quartiles")
    axes.set_ylim(0, 1.1 * float(course[["mean", "high"]].max(axis=None)) or None)
    axes.set_xlim(left=0)
    axes.grid()
    legend_above(figure, axes)
    return figure


def save_figure(figure: "Figure", stem: Path | str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write ``<stem>.pdf``, ``<stem>.svg`` and ``<stem>.png``, each atomically; the same figure gives the same bytes.

    Returns:
        The files, in the order of `formats`.

    Raises:
        UserError: an unknown format, or the folder cannot be written.
    """
    written = []
    for name in formats:
        path = Path(f"{stem}.{name}").expanduser()
        write_bytes(path, figure_bytes(figure, name))
        written.append(path)
    return written


def figure_bytes(figure: "Figure", kind: str) -> bytes:
    """The figure as the content of a ``pdf``, ``svg`` or ``png`` file, without a date.

    Raises:
        UserError: an unknown format.
    """
    from matplotlib import rc_context

    if kind not in FORMATS:
        raise UserError(f"formats: found {kind}; use some of {', '.join(FORMATS)}")
    content = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with rc_context(_STYLE):
        figure.savefig(content, format=kind, metadata=undated.get(kind))
    return content.getvalue()


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An :func:`empty_figure` with axes."""
    figure = empty_figure(width, height)
    return figure, figure.add_subplot()


def empty_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches that needs no display and leaves no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def logarithmic(axis: "XAxis | YAxis") -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _arms(frame: "pd.DataFrame") -> list[str]:
    return list(dict.fromkeys(frame["arm"]))


def _errors(rows: "pd.DataFrame") -> Any:
    """Percentage points (2, N) from the rate down to the lower and up to the upper end of its interval."""
    import numpy as np

    return 100 * np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]).clip(min=0)


def _name_rows(figure: "Figure", axes: "Axes", names: Iterable[str]) -> None:
    """Name the rows at heights 0, 1, ..., the first above; where names take many lines, the figure grows."""
    wrapped = [_wrapped(name, 34) for name in names]
    lines = max(name.count("\n") + 1 for name in wrapped)
    figure.set_figheight(max(figure.get_figheight(), 1.0 + (LINE * lines + 0.05) * len(wrapped)))
    axes.set_yticks(range(len(wrapped)), wrapped, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(wrapped) - 0.5, -0.5)
    axes.grid(axis="x")


def legend_above(figure: "Figure", axes: "Axes") -> None:
    """The arms above the plot, as many in a row as there is room for; what they need is added to the height."""
    handles, labels = axes.get_legend_handles_labels()
    letters = int(15 * figure.get_figwidth())  # of 8 points; a handle with its gaps takes the room of ten
    columns = max(1, min(len(labels), letters // (max(map(len, labels)) + 10)))
    row_by_row = [place for column in range(columns) for place in range(column, len(labels), columns)]
    handles = [handles[place] for place in row_by_row]  # matplotlib fills column by column
    words = [_wrapped(labels[place], letters - 10) for place in row_by_row]
    lines = sum(text.count("\n") + 1 for text in words) / columns
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    figure.legend(handles, words, loc="outside upper left", ncols=columns, handlelength=3.2)


def _note(figure: "Figure", axes: "Axes", text: str) -> None:
    """How to read the plot, above its right end; what it needs beyond a line is added to the height."""
    words = _wrapped(text, 52)
    figure.set_figheight(figure.get_figheight() + LINE * words.count("\n"))
    axes.set_title(words, fontsize=8, color=GREY, loc="right")


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines at spaces and, as names of runs and arms have few, behind signs inside of names."""

    wordsep_simple_re = re.compile(r"( +|(?<=[-_+./=])(?=[^\W\d_]))")


def _wrapped(text: str, width: int) -> str:
    return _Wrapper(width, break_on_hyphens=False).fill(printable(text))
