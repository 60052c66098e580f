"""One picture that shows an episode at a glance: its gripper, its speed and the frames that were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cot.keyframes import speed_m_s

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView

_PER_ROW = 10  # small pictures side by side
_COLOURS = {"first": "0.4", "last": "0.4", "close": "tab:red", "open": "tab:green", "slow": "tab:purple"}


def draw_episode(episode: EpisodeView, keys: Mapping[int, str], path: Path, camera: str = "agentview") -> None:
    """Draw gripper command, speed in m/s and the chosen frames with their pictures, as a PNG file.

    Args:
        episode: to draw.
        keys: chosen frames and why, as of :func:`~dtvla.cot.keyframes.key_frames`.
        path: of the file; it is replaced, its folder must exist.
        camera: whose pictures are shown.

    Raises:
        UserError: the pictures can't be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frames = sorted(keys)
    rows = -(-len(frames) // _PER_ROW)
    figure = Figure(figsize=(14, 3.2 + 1.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"episode {episode.number}: {episode.instruction}", parse_math=False)
    grid = figure.add_gridspec(rows + 2, _PER_ROW, height_ratios=[1.6] * rows + [1.2, 0.6])
    for place, (frame, picture) in enumerate(zip(frames, episode.pictures(camera, frames), strict=True)):
        axes = figure.add_subplot(grid[place // _PER_ROW, place % _PER_ROW])
        axes.imshow(picture)
        axes.set_title(f"{frame} {keys[frame]}", fontsize=9, color=_colour(keys[frame]))
        axes.set_axis_off()
    above = figure.add_subplot(grid[rows, :])
    if episode.state_FD.shape[1] < 3:
        above.text(0.5, 0.5, "no position in the states, so no speed", transform=above.transAxes, ha="center")
    else:
        _trace(above, "hand, m/s", speed_m_s(episode), keys)
    below = figure.add_subplot(grid[rows + 1, :])
    _trace(below, "gripper", episode.closing_F, keys)
    below.set_yticks([0, 1], ["open", "close"])
    below.set_ylim(-0.2, 1.2)
    below.set_xlabel("frame")
    figure.savefig(path, format="png", dpi=80)


def _trace(axes: Any, label: str, values_F: Any, keys: Mapping[int, str]) -> None:
    axes.step(range(len(values_F)), values_F, where="mid", color="tab:blue")
    for frame, reason in keys.items():
        axes.axvline(frame, color=_colour(reason), linewidth=1, linestyle="--")
    axes.set_xlim(-0.5, len(values_F) - 0.5)
    axes.set_ylabel(label)


def _colour(reason: str) -> str:
    return _COLOURS.get(reason, "tab:orange")
