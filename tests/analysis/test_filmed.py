"""Pictures of a film go back to the cameras and steps that they came from."""

from pathlib import Path

import numpy as np
import pytest
from evaluations import episode

from dtvla.analysis.filmed import filmed_observations
from dtvla.errors import UserError
from dtvla.sim.film import Caption, Film

STEPS, SIZE = 21, 64


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The left camera grows brighter with every step, the right one darker."""
    made = Film(tmp_path_factory.mktemp("film") / "film.mp4")
    for step in range(STEPS):
        left, right = (np.full((SIZE, SIZE, 3), shade, np.uint8) for shade in (10 * step, 250 - 10 * step))
        made.add(np.concatenate([left, right], axis=1), Caption("task", "thought", step))
    return made.finish()


def test_each_decision_gets_both_cameras_of_its_step(film: Path) -> None:
    record = episode(0, 0, True, decisions=3)
    observations = filmed_observations(film, record, SIZE)
    assert len(observations) == 3
    for thought, observation in zip(record.thoughts, observations, strict=True):
        assert observation["instruction"] == record.instruction
        for camera, shade in (("agentview", 10 * thought.step), ("wrist", 250 - 10 * thought.step)):
            picture = observation[camera]
            assert (picture.shape, picture.dtype) == ((SIZE, SIZE, 3), np.uint8)
            assert picture[4:-4, 4:-4].mean() == pytest.approx(shade, abs=3)


def test_a_film_of_a_shorter_episode_is_refused(film: Path) -> None:
    with pytest.raises(UserError, match="has 21 steps, but the episode decides at step 30"):
        filmed_observations(film, episode(0, 0, True, decisions=4), SIZE)
