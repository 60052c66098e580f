"""Replaying an episode: plain LIBERO and ours are equal to the last bit, and a difference would be seen."""

import copy
from typing import Any

import numpy as np
import pytest

from dtvla.benchmarks.parity import Moments, Settings, compare, episodes
from dtvla.benchmarks.recording import Recording
from dtvla.errors import UserError

ENV: dict[str, Any] = {
    "suite": "libero_object",
    "task_ids": None,
    "protocol": "published",
    "max_steps": 25,  # long enough to move every joint
    "render": "full",
    "image_size": 64,
    "settle_steps": 10,
    "stepping": "exact",
}
TASK = 0
Replayed = tuple[Recording, Moments, dict[str, Any]]


@pytest.fixture(scope="module")
def replayed() -> Replayed:
    """The expert's episode, disturbances included, in three processes."""
    return episodes(Settings(env=ENV, init_state=5), TASK)


@pytest.mark.sim
@pytest.mark.slow
def test_the_experts_episode_is_plain_liberos_bit_for_bit(replayed: Replayed) -> None:
    found = compare(*replayed)
    assert found["equal"], found
    assert (found["source"], found["steps"], found["observations"]) == ("expert", 25, 4)
    assert found["farthest_state"] == 0.0
    positions_SN = replayed[0].states_SN
    assert np.ptp(positions_SN[:, 1:8], axis=0).min() > 0.01  # all joints of the arm have moved


@pytest.mark.sim
@pytest.mark.slow
def test_the_smallest_difference_is_seen(replayed: Replayed) -> None:
    recording, ours, plain = copy.deepcopy(replayed)
    recording.states_SN[7, 3] = np.nextafter(recording.states_SN[7, 3], np.inf)
    plain["observed"][20]["wrist"][5, 5, 0] ^= 1
    found = compare(recording, ours, plain)
    assert (found["equal"], found["equal_states"], found["equal_chunks"]) == (False, False, True)
    assert 0.0 < found["farthest_state"] < 1e-15
    assert found["unequal_at"] == {"agentview": [], "wrist": [20], "state": []}
    plain["successes"][-1] = not plain["successes"][-1]
    plain["states"] = plain["states"][:-1]
    found = compare(*replayed[:2], plain)
    assert (found["equal_success"], found["equal_states"]) == (False, False)


def test_lower_quality_is_not_compared() -> None:
    with pytest.raises(UserError, match=r"^env.render: 'draft' has other pictures"):
        Settings(env=ENV | {"render": "draft"})
