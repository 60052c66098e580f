"""Stepping against robosuite's own step over a whole grasp, and what happens when the physics diverge."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtvla.sim.env import LiberoEnv, SimulationDiverged
from dtvla.sim.expert import Expert

pytestmark = pytest.mark.sim

SUITE, TASK, INIT = "libero_goal", 1, 2  # put the bowl on the stove: many contacts, a fixture placed at random


class RobosuiteStepper:
    """robosuite's own step, with its own look for contacts."""

    def __init__(self, env: LiberoEnv):
        del env.domain.check_contact
        self.domain = env.domain

    def step(self, action: np.ndarray) -> bool:
        _, reward, success, _ = self.domain.step(action)
        assert reward == float(success)
        return bool(success)


@dataclass
class Episode:
    """What an episode leaves behind, one entry per step."""

    actions: list[np.ndarray]
    physics: list[np.ndarray]
    observed: list[np.ndarray]
    solver: list[np.ndarray]
    success: bool = False

    @property
    def objects(self) -> np.ndarray:
        """Last positions and orientations of everything but the robot's nine joints."""
        return self.physics[-1][1 + 9 : 1 + 9 + 7 * 4]


def run(env: LiberoEnv, decide: Callable[[int], np.ndarray]) -> Episode:
    env.reset(options={"init_state": INIT})
    episode = Episode([], [], [], [])
    over = False
    while not over:
        action = decide(len(episode.actions))
        observation, _, episode.success, truncated, _ = env.step(action)
        over = episode.success or truncated
        data = env.domain.sim.data
        episode.actions.append(action)
        episode.physics.append(env.physics())
        episode.observed.append(observation["state"])
        episode.solver.append(np.concatenate([data.qacc_warmstart, data.qfrc_constraint, data.ctrl, data.sensordata]))
    return episode


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = LiberoEnv(SUITE, TASK, render="none")
    yield env
    env.close()


@pytest.fixture(scope="module")
def grasp(env: LiberoEnv) -> Episode:
    """The scripted expert grips, carries and places, in exact mode."""
    experts: list[Expert] = []

    def decide(step: int) -> np.ndarray:
        if step == 0:
            experts.append(Expert(env, seed=INIT))
        return experts[-1].act().executed

    episode = run(env, decide)
    assert episode.success
    return episode


def test_exact_is_robosuites_own_step_bit_for_bit_through_a_grasp(
    env: LiberoEnv, grasp: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the solver's warm start: a bit that differs there would come out in a later state."""
    monkeypatch.setitem(env.domain.__dict__, "check_contact", env.domain.check_contact)  # comes back afterwards
    monkeypatch.setattr(env, "_stepper", RobosuiteStepper(env))
    plain = run(env, lambda step: grasp.actions[step])
    assert plain.success
    for name in ("physics", "observed", "solver"):
        np.testing.assert_array_equal(np.array(getattr(grasp, name)), np.array(getattr(plain, name)), err_msg=name)


def test_fast_solves_less_and_ends_the_same_way(grasp: Episode) -> None:
    env = LiberoEnv(SUITE, TASK, render="none", stepping="fast")
    fast = run(env, lambda step: grasp.actions[min(step, len(grasp.actions) - 1)])
    env.close()
    assert fast.success
    assert abs(len(fast.actions) - len(grasp.actions)) <= 2
    assert not np.array_equal(fast.physics[0], grasp.physics[0])
    assert len(fast.objects) == 28
    np.testing.assert_allclose(fast.objects, grasp.objects, atol=0.005)


def test_contacts_are_found_as_robosuite_finds_them(env: LiberoEnv, grasp: Episode) -> None:
    domain = env.domain
    robosuite = type(domain).check_contact
    gripper = domain.robots[0].gripper
    pads = gripper.important_geoms["left_fingerpad"]
    models: list[Any] = [*domain.objects_dict.values(), *domain.fixtures_dict.values(), gripper]
    pairs = [(first, second) for first in models for second in models]
    pairs += [(pads, model) for model in models] + [(pads[0], model) for model in models] + [(pads, None)]
    env.reset(options={"init_state": INIT})
    found = set()
    for step, action in enumerate(grasp.actions):
        env.step(action)
        if step % 20 == 19:
            ours = [domain.check_contact(*pair) for pair in pairs]
            assert ours == [robosuite(domain, *pair) for pair in pairs]
            found.update(zip(range(len(pairs)), ours, strict=True))
    assert len(found) > len(pairs), "no pair both touched and did not: the comparison shows nothing"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qpos", np.nan, "position 12 is not finite"),
        ("qvel", np.inf, "velocity 12 is not finite"),
        ("qvel", 9e9, "acceleration [0-9]+ is not finite"),
    ],
)
def test_a_simulation_that_diverges_is_an_error_and_a_reset_recovers(
    field: str, value: float, message: str, env: LiberoEnv, grasp: Episode, tmp_path: Path, monkeypatch: Any
) -> None:
    """MuJoCo alone would reset itself to the model's first state and go on as if nothing had happened."""
    monkeypatch.chdir(tmp_path)
    env.reset(options={"init_state": INIT})
    getattr(env.domain.sim.data, field)[12] = value
    with pytest.raises(SimulationDiverged, match=f"^libero_goal task 1: the simulation diverged .{message}"):
        env.step(grasp.actions[0])
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(grasp.actions[0])
    assert list(tmp_path.iterdir()) == [], "MuJoCo's log file"
    env.reset(options={"init_state": INIT})
    env.step(grasp.actions[0])
    np.testing.assert_array_equal(env.physics(), grasp.physics[0])
