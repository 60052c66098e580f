"""Key frames: gripper events without flicker, midpoints, minima of the speed, and their picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtvla.cot.episode_picture import draw_episode
from dtvla.cot.keyframes import KeyFrameSettings, gripper_events, held_commands, key_frames, speed_m_s
from dtvla.errors import UserError


class Episode:
    """What key frames need of an episode; a picture's colour tells its frame."""

    fps, number, root, instruction = 20.0, 4, "somewhere", "cost $1 to put the cup on the_tray"

    def __init__(self, closing_F: np.ndarray, state_FD: np.ndarray) -> None:
        self.closing_F, self.state_FD = closing_F, state_FD
        self.asked: list[tuple[str, list[int]]] = []

    def __len__(self) -> int:
        return len(self.closing_F)

    def pictures(self, camera: str, frames: list[int]) -> Iterator[np.ndarray]:
        self.asked.append((camera, frames))
        return (np.full((8, 8, 3), frame, np.uint8) for frame in frames)


def episode(closing_F: np.ndarray, speed_F: np.ndarray | None = None) -> Any:
    x_F = np.cumsum(np.ones(len(closing_F)) if speed_F is None else speed_F) / Episode.fps
    return Episode(closing_F, np.stack([x_F, 0 * x_F, 0 * x_F, 0 * x_F], axis=1).astype(np.float32))


def runs(rng: np.random.Generator, debounce: int) -> tuple[np.ndarray, list[int]]:
    """Commands that hold, and the frames where they begin."""
    lengths = rng.integers(2 * debounce, 6 * debounce, size=rng.integers(1, 6))
    closing_F = np.repeat((np.arange(len(lengths)) + rng.integers(2)) % 2 == 1, lengths)
    return closing_F, np.cumsum(lengths)[:-1].tolist()


@pytest.mark.parametrize("debounce", [1, 2, 3, 5])
def test_events_are_where_a_held_command_begins_and_flicker_is_none(debounce: int) -> None:
    rng = np.random.default_rng(debounce)
    for _ in range(200):
        closing_F, starts = runs(rng, debounce)
        assert gripper_events(closing_F, debounce) == starts
        flicker_F = closing_F.copy()
        begins = [0, *starts]
        for start in begins if debounce > 1 else []:  # in the middle of a command that holds on both sides
            stop = min([s for s in starts if s > start], default=len(closing_F))
            width = int(rng.integers(1, debounce))
            at = start + debounce
            if at + width + debounce <= stop:
                flicker_F[at : at + width] ^= True
        assert gripper_events(flicker_F, debounce) == starts
        assert np.array_equal(held_commands(flicker_F, debounce), closing_F)


def test_a_command_that_the_episodes_end_cuts_short_counts() -> None:
    for held in range(1, 6):
        closing_F = np.r_[np.zeros(10, bool), np.ones(held, bool)]
        assert gripper_events(closing_F, 3) == [10]


def test_flicker_at_the_start_is_no_event() -> None:
    assert gripper_events(np.array([1, 1, 0, 0, 0, 0], dtype=bool), 3) == []
    assert gripper_events(np.array([1, 0, 1, 0, 1], dtype=bool), 3) == []
    assert gripper_events(np.array([True]), 3) == []


def test_first_and_last_frame_are_key_frames_of_every_episode() -> None:
    for count in (1, 2, 3, 50):
        keys = key_frames(episode(np.zeros(count, bool)), KeyFrameSettings())
        assert keys == ({0: "first", count - 1: "last"} if count > 1 else {0: "first"})


def test_events_are_named_by_their_command_and_frames_ascend() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        closing_F, starts = runs(rng, 3)
        keys = key_frames(episode(closing_F), KeyFrameSettings(midpoints_beyond=7))
        assert list(keys) == sorted(keys)
        assert {f: r for f, r in keys.items() if r in ("open", "close")} == {
            f: "close" if closing_F[f] else "open" for f in starts
        }


@pytest.mark.parametrize("longest", [2, 5, 30])
def test_midpoints_leave_no_longer_gap_and_none_is_superfluous(longest: int) -> None:
    rng = np.random.default_rng(longest)
    for _ in range(100):
        closing_F, _ = runs(rng, 3)
        plain = sorted(key_frames(episode(closing_F), KeyFrameSettings()))
        keys = sorted(key_frames(episode(closing_F), KeyFrameSettings(midpoints_beyond=longest)))
        assert set(plain) <= set(keys)
        assert max(np.diff(keys), default=0) <= longest
        for start, stop in zip(plain, plain[1:], strict=False):
            assert sum(start < key < stop for key in keys) == -(-(stop - start) // longest) - 1


def test_the_speed_is_in_metres_a_second_whatever_its_direction() -> None:
    rng = np.random.default_rng(0)
    for speed in (0.05, 0.3):
        made = episode(np.zeros(40, bool), np.full(40, speed))
        turn_33, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        made.state_FD[:, :3] = made.state_FD[:, :3] @ turn_33 + rng.normal(size=3)
        assert speed_m_s(made) == pytest.approx(np.full(40, speed), rel=1e-3)


def test_a_hand_that_slows_down_is_a_key_frame_and_small_changes_are_none() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        dip = int(rng.integers(20, 60))
        frames = np.arange(80)
        speed_F = 0.3 - 0.25 * np.exp(-(((frames - dip) / 4) ** 2)) + rng.normal(0, 0.002, 80)
        keys = key_frames(episode(np.zeros(80, bool), speed_F), KeyFrameSettings(velocity_minima=True))
        slow = [frame for frame, reason in keys.items() if reason == "slow"]
        assert len(slow) == 1
        assert abs(slow[0] - dip) <= 2
        near_F = np.arange(80) >= dip + 3
        assert "slow" not in key_frames(episode(near_F, speed_F), KeyFrameSettings(velocity_minima=True)).values()
        steady = episode(np.zeros(80, bool), 0.3 + rng.normal(0, 0.002, 80))
        assert "slow" not in key_frames(steady, KeyFrameSettings(velocity_minima=True)).values()
    still = episode(np.zeros(30, bool), np.zeros(30))
    assert list(key_frames(still, KeyFrameSettings(velocity_minima=True))) == [0, 29]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"debounce": 0}, "keyframes.debounce: found 0"),
        ({"midpoints_beyond": 1}, "keyframes.midpoints_beyond: found 1"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        KeyFrameSettings(**settings)  # type: ignore[arg-type]


def test_minima_need_a_position() -> None:
    made = Episode(np.zeros(9, bool), np.zeros((9, 2), np.float32))
    with pytest.raises(UserError, match=r"keyframes.velocity_minima: .* 2 numbers"):
        key_frames(made, KeyFrameSettings(velocity_minima=True))  # type: ignore[arg-type]
    assert key_frames(made, KeyFrameSettings())  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [2, 8])
def test_the_picture_shows_every_key_frame(tmp_path: Path, width: int) -> None:
    from PIL import Image

    closing_F = np.arange(120) // 20 % 2 == 1
    made = Episode(closing_F, np.random.default_rng(0).normal(size=(120, width)).astype(np.float32))
    keys = key_frames(made, KeyFrameSettings(midpoints_beyond=10))  # type: ignore[arg-type]
    path = tmp_path / "episode.picture"
    draw_episode(made, keys, path, camera="wrist")  # type: ignore[arg-type]
    assert made.asked == [("wrist", sorted(keys))]
    shades = np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0)
    grey = {int(r) for r, g, b in shades if r == g == b}
    assert set(keys) <= grey  # each picture is one shade, that of its frame
