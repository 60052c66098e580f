"""What a policy saw in an episode, read back from its film."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dtvla.analysis.strip import read_pictures
from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult
from dtvla.sim.settings import CAMERAS


def filmed_observations(film: Path, episode: EpisodeResult, image_size: int) -> list[Mapping[str, Any]]:
    """Observations of an episode's decisions, as :meth:`dtvla.policy.policy.Policy.act` takes them.

    Films are compressed, so pictures are close to those of the episode and not the same: a decision made on them may
    be another one.

    Args:
        film: of ``dtvla evaluate`` with ``record``.
        episode: its record.
        image_size: side of the cameras' pictures in pixels, ``settings.image_size`` of the results.

    Raises:
        UserError: the film cannot be read, or is shorter than the episode.
    """
    pictures = read_pictures(film)
    last = max((thought.step for thought in episode.thoughts), default=0)
    if last >= len(pictures):
        raise UserError(
            f"video: {film} has {len(pictures)} steps, but the episode decides at step {last}; give its own"
        )
    observations: list[Mapping[str, Any]] = []
    for thought in episode.thoughts:
        picture = pictures[thought.step]
        small = picture.resize((len(CAMERAS) * image_size, image_size), Image.Resampling.BOX)
        sides = np.split(np.array(small), len(CAMERAS), axis=1)
        observations.append({**dict(zip(CAMERAS, sides, strict=True)), "instruction": episode.instruction})
    return observations
