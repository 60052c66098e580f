"""The course of a training run as a picture, from its ``metrics.csv``."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from dtvla.analysis.plots import COLOURS, empty_figure, in_style, logarithmic
from dtvla.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, tuple[list[int], list[float]]]  # metric -> (steps, values)

TRAIN_COLOUR, VALIDATION_COLOUR, OTHER_COLOURS = COLOURS[0], COLOURS[2], (COLOURS[4], COLOURS[6])


@dataclass(frozen=True)
class Panel:
    """One plot: a title, the unit of its y axis, and the metrics (without ``train/`` and ``val/``) that it shows."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    share: bool = False  # the y axis is a share in [0, 1]
    logarithmic: bool = False


PANELS = (
    Panel("loss", "mean over tokens", ("loss",), logarithmic=True),
    Panel("action error", "mean absolute error, robot units", ("action_l1",), logarithmic=True),
    Panel("token accuracy", "share", ("action_accuracy", "thought_accuracy"), share=True),
    Panel("success in LIBERO", "share", ("success",), share=True),
)


def read_metrics(path: Path) -> Series:
    """Read a metrics file: a column ``step`` and one column per metric, empty where it was not logged.

    Values that are no finite numbers are left out.

    Raises:
        UserError: the file is missing, has no step column, or holds something that is not a number.
    """
    series: Series = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                for name, value in row.items():
                    if value and isfinite(float(value)):
                        steps, values = series.setdefault(name, ([], []))
                        steps.append(step)
                        values.append(float(value))
    except FileNotFoundError:
        raise UserError(f"run: {path} does not exist; give the folder of a training run") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"run: {path} is damaged ({error!r}); give the folder of a training run") from None
    return series


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over a window of up to `width` values that is centred at each value and cut at the ends."""
    half = width // 2
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot_curves(
    series: Mapping[str, tuple[list[int], list[float]]], panels: Sequence[Panel] = PANELS
) -> "Figure | None":
    """A plot for each panel that has data: training (pale raw, strong smoothed) and validation; None without data."""
    panels = [p for p in panels if any(_select(series, metric) for metric in p.metrics)]
    return _draw_panels(panels, series) if panels else None


def _select(series: Mapping[str, tuple[list[int], list[float]]], metric: str) -> list[tuple[str, str]]:
    """(column, split) of a metric; columns are ``<split>/<metric>``."""
    return [(name, name.split("/")[0]) for name in series if name.split("/", 1)[-1] == metric]


@in_style
def _draw_panels(panels: Sequence[Panel], series: Mapping[str, tuple[list[int], list[float]]]) -> "Figure":
    figure = empty_figure(4.4 * len(panels), 3.5)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, series)
    return figure


def _draw_panel(axes: "Axes", panel: Panel, series: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for number, metric in enumerate(panel.metrics):
        prefix = metric.replace("_accuracy", "") + " " if len(panel.metrics) > 1 else ""
        for column, split in _select(series, metric):
            steps, values = series[column]
            style = "-" if number == 0 else "--"
            if split == "train":
                axes.plot(steps, values, color=TRAIN_COLOUR, alpha=0.18, linewidth=0.8)
                width = max(1, len(values) // 25)
                axes.plot(
                    steps, smooth(values, width), style, color=TRAIN_COLOUR, label=f"{prefix}train", linewidth=1.8
                )
            else:
                colour = VALIDATION_COLOUR if split == "val" else OTHER_COLOURS[number % 2]
                axes.plot(
                    steps, values, f"o{style}", color=colour, label=f"{prefix}{split}", linewidth=1.6, markersize=3
                )
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    elif panel.logarithmic and all(v > 0 for m in panel.metrics for c, _ in _select(series, m) for v in series[c][1]):
        logarithmic(axes.yaxis)
    axes.set_xlim(left=0)
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(panel.unit)
    axes.grid()
    axes.legend()
