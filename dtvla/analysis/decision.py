"""One decision of a policy beside what the demonstration did: cameras, thoughts, and the actions of the chunk."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_THOUGHT = "(none)"
ACTIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
TRUE_COLOUR, PREDICTED_COLOUR, FAINT = "#6B6B6B", "#D55E00", "#7A7A7A"
WIDTH, HEIGHT, DPI = 13.0, 6.6, 100  # inches, and pixels an inch
MARGIN = 0.02  # of the width
LETTER_SIZES = (12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0)  # points
LETTER_WIDTH, LINE_HEIGHT = 0.53, 1.35  # of the letter size, on the average


@dataclass(frozen=True)
class Sample:
    """What is drawn.

    Attributes:
        instruction: what to do.
        where: of the frame, such as "episode 3, frame 17 of 90".
        pictures: by camera, uint8 (H, W, 3).
        true_thought, thought: of the demonstration and of the policy; None or "" where there is none.
        true_SD, actions_SD: actions in robot units, likewise.
    """

    instruction: str
    where: str
    pictures: Mapping[str, np.ndarray]
    true_thought: str | None
    thought: str | None
    true_SD: np.ndarray
    actions_SD: np.ndarray


def draw_decision(sample: Sample, title: str, path: Path) -> Path:
    """Write a PNG of 1300 x 660 pixels, atomically.

    Args:
        sample: what is drawn.
        title: stands before the frame's place, such as the training step.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display and without global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
    FigureCanvasAgg(figure)
    instruction = textwrap.shorten(_printable(sample.instruction), 100, placeholder=" …")
    _write(figure, MARGIN, 0.955, instruction, fontsize=15, weight="bold")
    _draw_pictures(figure, sample.pictures)
    _draw_thought(figure, 0.475, "thought of the demonstration", TRUE_COLOUR, sample.true_thought)
    _draw_thought(figure, 0.235, "thought of the policy", PREDICTED_COLOUR, sample.thought)
    _draw_actions(figure, sample.true_SD, sample.actions_SD)
    _write(figure, 1 - MARGIN, 0.065, f"{title}, {sample.where}", fontsize=9.5, color=FAINT, ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    try:
        with warnings.catch_warnings():  # an untrained policy writes signs that the font lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _draw_pictures(figure: Figure, pictures: Mapping[str, np.ndarray]) -> None:
    """All cameras in one row above the thoughts."""
    left, right, bottom, top = MARGIN, 0.42, 0.52, 0.9
    gap = 0.01
    width = min((right - left - gap * (len(pictures) - 1)) / len(pictures), (top - bottom) * HEIGHT / WIDTH)
    for number, (camera, picture) in enumerate(pictures.items()):
        place = (left + number * (width + gap), top - width * WIDTH / HEIGHT, width, width * WIDTH / HEIGHT)
        axes = figure.add_axes(place)
        axes.imshow(picture, interpolation="lanczos")
        axes.set_axis_off()
        axes.set_title(camera, fontsize=9, color=FAINT, loc="left", pad=3)


def _draw_thought(figure: Figure, top: float, heading: str, colour: str, thought: str | None) -> None:
    """A heading and the thought below it, in letters that let it fit; what does not fit the smallest is cut."""
    _write(figure, MARGIN, top, heading, fontsize=10, color=colour, weight="bold")
    text = _printable(thought or "")
    width, height = (0.42 - MARGIN) * WIDTH * 72, 0.19 * HEIGHT * 72  # points
    for size in LETTER_SIZES:
        lines = textwrap.wrap(text, int(width / (LETTER_WIDTH * size)))
        room = int(height / (LINE_HEIGHT * size))
        if len(lines) <= room:
            break
    else:
        lines = [*lines[: room - 1], f"{lines[room - 1][:-2]} …"]
    style = {"style": "normal"} if lines else {"style": "italic", "color": FAINT}
    shown = "\n".join(lines) or NO_THOUGHT
    _write(figure, MARGIN, top - 0.022, shown, fontsize=size, va="top", linespacing=1.2, **style)


def _draw_actions(figure: Figure, true_SD: np.ndarray, actions_SD: np.ndarray) -> None:
    """A small plot for each action dimension; all have one scale, that of the controller's range at least."""
    from matplotlib.lines import Line2D

    steps, dimensions = true_SD.shape
    names = ACTIONS if dimensions == len(ACTIONS) else tuple(f"action {index + 1}" for index in range(dimensions))
    rows = -(-dimensions // 3)
    largest = max(1.0, float(np.abs(true_SD).max()), float(np.abs(actions_SD).max())) * 1.08
    grid = figure.add_gridspec(rows, 3, left=0.475, right=1 - MARGIN, bottom=0.075, top=0.875, hspace=0.42, wspace=0.14)
    for index, name in enumerate(names):
        axes = figure.add_subplot(grid[index // 3, index % 3])
        _draw_action(axes, true_SD[:, index], actions_SD[:, index], largest)
        axes.set_title(name, fontsize=11, loc="left", weight="bold", pad=4)
        error = float(np.abs(true_SD[:, index] - actions_SD[:, index]).mean())
        axes.set_title(f"mean error {error:.2f}", fontsize=9, color=FAINT, loc="right", pad=4)
        if index % 3:
            axes.set_yticklabels([])
    handles = [
        Line2D([], [], color=TRUE_COLOUR, linewidth=2.4, label="demonstration"),
        Line2D([], [], color=PREDICTED_COLOUR, linewidth=1.6, marker="o", markersize=3.5, label="policy"),
    ]
    error = float(np.abs(true_SD - actions_SD).mean())
    text = f"robot units, over the {steps} steps of the chunk\nmean error of all {error:.3f}"
    right = 1 - MARGIN
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=(right, 0.18), ncols=2, fontsize=10, frameon=False)
    _write(figure, right, 0.13, text, fontsize=9.5, color=FAINT, ha="right", linespacing=1.5)


def _draw_action(axes: Axes, true_S: np.ndarray, actions_S: np.ndarray, largest: float) -> None:
    steps_S = np.arange(1, len(true_S) + 1)
    axes.axhline(0, color="#CCCCCC", linewidth=0.8)
    axes.plot(steps_S, true_S, color=TRUE_COLOUR, linewidth=2.4)
    axes.plot(steps_S, actions_S, color=PREDICTED_COLOUR, linewidth=1.6, marker="o", markersize=3.5)
    axes.set_ylim(-largest, largest)
    axes.set_yticks([-1, 0, 1])
    axes.set_xticks([1, len(true_S)])
    axes.tick_params(labelsize=8, colors=FAINT, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#CCCCCC")


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x, y, text, parse_math=False, **{"va": "center", **style})


def _printable(text: str) -> str:
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
