"""Films: decodable, of the right length and size, with the whole thought readable."""

from pathlib import Path

import av
import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.sim.film import HOLD_FRAMES, PANEL_WIDTH, Caption, Film, compose, fit, partial_path


def random_frames(count: int, height: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, 2 * height, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("height", "scale"), [(256, 2), (96, 5), (101, 5)])
def test_film_has_every_frame_once_and_holds_the_outcome(tmp_path: Path, height: int, scale: int) -> None:
    frames = random_frames(4, height)
    captions = [Caption("lift the bowl", "going down", i, True if i == 3 else None) for i in range(4)]
    film = Film(tmp_path / "films" / "a.mp4")
    for frame_HWC, caption in zip(frames, captions, strict=True):
        film.add(frame_HWC, caption)
        assert not film.path.exists(), "a film appears when it is complete"
    path = film.finish()
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 20
        assert container.duration == (4 + HOLD_FRAMES) * 50_000  # microseconds
    assert len(decoded) == 4 + HOLD_FRAMES
    assert decoded[0].shape == (scale * height + scale * height % 2, 2 * scale * height + PANEL_WIDTH, 3)
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_picture_is_left_and_untouched_where_the_scene_is() -> None:
    frame = np.full((128, 256, 3), 77, np.uint8)
    composed = compose(frame, Caption("lift", "thought", 3))
    assert (composed[:512, :1024] == 77).all()
    assert (composed[:, 1024:] > 200).any()


@pytest.mark.parametrize(
    "change", [{"thought": "another thought"}, {"step": 4}, {"outcome": True}, {"instruction": "x"}]
)
def test_panel_shows_instruction_thought_step_and_outcome(change: dict[str, object]) -> None:
    frame = random_frames(1, 64)[0]
    fields: dict[str, object] = {"instruction": "lift", "thought": "a thought", "step": 3}
    before = compose(frame, Caption(**fields))  # type: ignore[arg-type]
    after = compose(frame, Caption(**{**fields, **change}))  # type: ignore[arg-type]
    assert (before[:, -PANEL_WIDTH:] != after[:, -PANEL_WIDTH:]).any()


@pytest.mark.parametrize("words", [1, 20, 60, 90])
def test_a_thought_of_usual_length_is_shown_whole(words: int) -> None:
    rng = np.random.default_rng(words)
    text = " ".join("".join(rng.choice(list("abcdefgh"), rng.integers(1, 12))) for _ in range(words))
    font, lines = fit(text, 528, 260)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 528 for line in lines)


def test_an_endless_thought_says_how_much_is_missing() -> None:
    _, lines = fit(" ".join(["word"] * 3000), 528, 260)
    shown = sum(line.split().count("word") for line in lines[:-1])
    assert lines[-1] == f"... and {3000 - shown} more words"


def test_a_word_wider_than_the_panel_is_broken_not_lost() -> None:
    font, lines = fit("x" * 300, 528, 260)
    assert "".join(lines) == "x" * 300
    assert all(font.getlength(line) <= 528 for line in lines)


def test_no_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a frame"):
        Film(tmp_path / "a.mp4").finish()
    assert not list(tmp_path.iterdir())


def test_an_abandoned_film_leaves_nothing_and_a_second_try_replaces_a_broken_one(tmp_path: Path) -> None:
    frame = random_frames(1, 64)[0]
    film = Film(tmp_path / "a.mp4")
    for step in range(40):  # more than the encoder keeps to itself
        film.add(frame, Caption("lift", "", step))
    assert len(list(tmp_path.iterdir())) == 1
    film.abandon()
    film.abandon()
    assert not list(tmp_path.iterdir())
    partial_path(tmp_path / "a.mp4").write_bytes(b"what a killed worker left")
    again = Film(tmp_path / "a.mp4")
    again.add(frame, Caption("lift", "", 0))
    again.finish()
    again.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_film_that_can_not_be_written_is_a_clear_error() -> None:
    film = Film(Path("/dev/null/films/a.mp4"))
    with pytest.raises(UserError, match=r"^record: the film /dev/null/films/a.mp4 can't be written \(Not a directory"):
        film.add(random_frames(1, 64)[0], Caption("lift", "", 0))
