"""Charts of a page as numbers: places in percent, which the page turns into drawings that fit any width.

A picture of fixed size would have unreadable letters on a phone. Here only places scale; letters, dots and line widths
keep their size, because the page draws them in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dtvla.analysis.curves import Panel, smooth

MARKERS = (  # outlines of about 10 pixels around (0, 0); one more than colours, so that 42 arms differ in the pair
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",  # circle
    "M-4.5,-4.5h9v9h-9z",  # square
    "M0,-6L5.5,4.5L-5.5,4.5z",  # triangle
    "M0,-6.5L6,0L0,6.5L-6,0z",  # diamond
    "M-1.7,-5.5h3.4v3.8h3.8v3.4h-3.8v3.8h-3.4v-3.8h-3.8v-3.4h3.8z",  # plus
    "M0,6L5.5,-4.5L-5.5,-4.5z",  # triangle upside down
    "M-5.2,-2.8l2.4,-2.4L0,-2.4l2.8,-2.8l2.4,2.4L2.4,0l2.8,2.8l-2.4,2.4L0,2.4l-2.8,2.8l-2.4,-2.4L-2.4,0z",  # cross
)
DASHES = ("none", "7 4", "2 3", "9 3 2 3", "12 4", "4 4", "1 5")
MOST_POINTS = 300  # of a line; more cannot be seen on a screen
MARGIN = 0.04  # of the range of a plot, above and below


@dataclass(frozen=True)
class Tick:
    """A place on an axis in percent of its length, and the words at it."""

    place: float
    words: str


@dataclass(frozen=True)
class Mark:
    """A value with its interval: places in percent; `arm` chooses colour and shape; `words` say it exactly."""

    arm: int
    place: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class DotPlot:
    """Rows of marks over one horizontal axis.

    Attributes:
        rows: (label, its marks).
        ticks: of the axis.
        unit: of the axis.
        zero: place of the value 0 when it lies inside the axis, not at its end; else None.
    """

    rows: list[tuple[str, list[Mark]]]
    ticks: list[Tick]
    unit: str
    zero: float | None = None


@dataclass(frozen=True)
class Value:
    """What a mark is made of: an arm's number, its value and interval in units of the axis, and the same in words."""

    arm: int
    value: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Series:
    """What a line is made of: x ascending, y of the same length; `band` are (low, high) of the same length or None."""

    label: str
    arm: int
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    faint: bool = False
    dash: int | None = None


@dataclass(frozen=True)
class Line:
    """A drawn series: points of SVG's polyline and polygon in a square of 100 x 100, y downwards."""

    label: str
    arm: int
    points: str
    band: str
    faint: bool
    dash: str


@dataclass(frozen=True)
class LinePlot:
    """Lines over common axes."""

    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Percent of the axis, clipped to it."""
        low, high, value = (self._bent(v) for v in (self.low, self.high, value))
        return min(100.0, max(0.0, 100 * (value - low) / (high - low)))

    def _bent(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.logarithmic else value

    def ticks(self, count: int) -> list[Tick]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        subs = (1.0, 2.0, 5.0) if self.high < 100 * self.low else (1.0,)
        locator = LogLocator(subs=subs, numticks=count + 1) if self.logarithmic else MaxNLocator(count)
        inside = [v for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high * (1 + 1e-9)]
        return [Tick(self.place(v), f"{v:,.6g}") for v in inside]


def dot_plot(
    rows: Sequence[tuple[str, Sequence[Value]]],
    limits: tuple[float, float] | None = None,
    *,
    least: tuple[float, float] | None = None,
    unit: str = "",
) -> DotPlot:
    """Place values with intervals on a horizontal axis.

    Args:
        rows: (label, values); at least one value in all.
        limits: ends of the axis; None: as the values need, 0 included.
        least: ends that such an axis reaches at least.
        unit: of the axis.
    """
    values = [value for _, row in rows for value in row]
    if limits is None:
        ends = [0.0, *(least or ()), *(v.low for v in values), *(v.high for v in values)]
        low, high = min(ends), max(ends)
        limits = (low, high if high > low else low + 1)
    scale = _Scale(*limits)

    def mark(v: Value) -> Mark:
        return Mark(v.arm, scale.place(v.value), scale.place(v.low), scale.place(v.high), v.words)

    placed = [(label, [mark(value) for value in row]) for label, row in rows]
    return DotPlot(placed, scale.ticks(5), unit, scale.place(0) if limits[0] < 0 < limits[1] else None)


def line_plot(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    share: bool = False,
    logarithmic: bool = False,
) -> LinePlot:
    """Place lines in a plot.

    Args:
        title: above the plot.
        unit: of the y axis.
        series: at least one, with at least one point; no value may be infinite or NaN.
        share: the y axis is [0, 1].
        logarithmic: of the y axis; heeded only if all values are above 0.
    """
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for values in (line.y, *(line.band or ())) for y in values]
    logarithmic = logarithmic and min(ys) > 0
    x_scale = _Scale(min(0.0, *xs), max(xs) if max(xs) > 0 else 1.0)
    y_scale = _Scale(*_limits(ys, share, logarithmic), logarithmic)
    lines = [_line(line, x_scale, y_scale) for line in series]
    return LinePlot(title, unit, lines, x_scale.ticks(5), y_scale.ticks(4))


def curves_plot(panel: Panel, series: Mapping[str, tuple[list[int], list[float]]]) -> LinePlot | None:
    """The plot of a panel of training curves: pale what was logged, strong its running mean; None without data."""
    lines: list[Series] = []
    for number, metric in enumerate(panel.metrics):
        prefix = f"{metric.replace('_accuracy', '')} " if len(panel.metrics) > 1 else ""
        for column in (name for name in series if name.split("/", 1)[-1] == metric):
            split = column.split("/")[0]
            x, y = thin(*series[column])
            if not y:
                continue
            arm = {"train": 0, "val": 1}.get(split, 2)
            if split == "train":
                lines.append(Series("", arm, x, y, faint=True))
                y = smooth(y, max(1, len(y) // 25))
            lines.append(Series(f"{prefix}{split}", arm, x, y, dash=number))
    if not lines:
        return None
    return line_plot(panel.title, panel.unit, lines, share=panel.share, logarithmic=panel.logarithmic)


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equal runs of neighbours; values that are no finite numbers are left out."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    run = -(-len(kept) // most)
    groups = [kept[start : start + run] for start in range(0, len(kept), run or 1)]
    means = [(sum(a for a, _ in group) / len(group), sum(b for _, b in group) / len(group)) for group in groups]
    return [a for a, _ in means], [b for _, b in means]


def _limits(ys: Sequence[float], share: bool, logarithmic: bool) -> tuple[float, float]:
    if share:
        return min(0.0, *ys) - MARGIN, max(1.0, *ys) + MARGIN
    low, high = min(ys), max(ys)
    if logarithmic:
        room = max((high / low) ** MARGIN, 1.1)
        return low / room, high * room
    low = min(low, 0.0)
    return low, high + (MARGIN * (high - low) or 1.0)


def _line(line: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    def points(values: Sequence[float]) -> list[str]:
        return [f"{x_scale.place(x):.2f},{100 - y_scale.place(y):.2f}" for x, y in zip(line.x, values, strict=True)]

    band = [] if line.band is None else points(line.band[0]) + points(line.band[1])[::-1]
    dash = DASHES[(line.arm if line.dash is None else line.dash) % len(DASHES)]
    return Line(line.label, line.arm, " ".join(points(line.y)), " ".join(band), line.faint, dash)
