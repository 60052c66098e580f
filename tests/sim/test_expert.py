"""The expert solves real tasks, speaks sense and stays a function of what can be seen."""

from collections.abc import Iterator

import numpy as np
import pytest

from dtvla.cot.objects import spoken
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Act, Expert, expert_tasks
from dtvla.sim.grasps import turn
from dtvla.sim.motion import Disturbance, servo

EXPECTED_ORDER = ["reach", "lower", "grasp", "lift", "carry", "place", "release", "retreat"]


def episode(env: LiberoEnv, expert: Expert, limit: int = 400) -> tuple[bool, list[Act]]:
    acts: list[Act] = []
    success = False
    while not success and len(acts) < limit:
        acts.append(expert.act())
        _, _, success, truncated, _ = env.step(acts[-1].executed)
        if truncated:
            break
    return success, acts


@pytest.fixture(scope="module")
def soup() -> Iterator[LiberoEnv]:
    env = LiberoEnv("libero_object", 0, render="none", max_steps=280)
    yield env
    env.close()


def test_solves_and_narrates_with_disturbances(soup: LiberoEnv) -> None:
    names = [spoken("alphabet_soup_1"), spoken("basket_1")]
    for init_state in (0, 31):
        soup.reset(options={"init_state": init_state})
        success, acts = episode(soup, Expert(soup, seed=init_state))
        assert success
        assert len(acts) < 200
        thoughts = [act.thought for act in acts]
        schema = Schema(SchemaSettings(min_words=20, max_words=60))
        assert all(schema.violations(thought, names) == [] for thought in set(thoughts))
        changes = sum(first != second for first, second in zip(thoughts, thoughts[1:], strict=False))
        assert changes <= 14, "a thought must last"
        actions = np.array([act.action for act in acts])
        executed = np.array([act.executed for act in acts])
        assert actions.dtype == executed.dtype == np.float32
        assert np.abs(np.concatenate([actions, executed])).max() <= 1.0
        assert not np.array_equal(actions, executed)


def test_without_noise_it_goes_through_its_phases_once_and_repeats_itself(soup: LiberoEnv) -> None:
    runs = []
    for seed in (1, 2):
        soup.reset(options={"init_state": 5})
        success, acts = episode(soup, Expert(soup, seed=seed, noise=0.0))
        assert success
        phases = [act.phase for act in acts]
        order = [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]
        assert order == EXPECTED_ORDER[: len(order)]
        for act in acts:
            np.testing.assert_array_equal(act.action, act.executed)
        runs.append(np.array([act.action for act in acts]))
    np.testing.assert_array_equal(*runs)


def test_recovers_from_a_lost_object(soup: LiberoEnv) -> None:
    """Fingers are forced open in the middle of the transport; the label stays the expert's own."""
    soup.reset(options={"init_state": 2})
    expert = Expert(soup, seed=0, noise=0.0)
    carried, success = 0, False
    while not success and soup.step_count < soup.max_steps - 1:
        act = expert.act()
        carried += act.phase == "carry"
        action = act.action.copy()
        if act.phase == "carry" and carried in range(8, 18):
            assert action[6] == 1.0
            action[6] = -1.0
        _, _, success, _, info = soup.step(action)
    assert success
    assert expert.attempts >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 1), ("libero_goal", 8)])
def test_solves_a_task_of_the_other_suites(suite: str, task_id: int) -> None:
    env = LiberoEnv(suite, task_id, render="none", max_steps=300)
    outcomes = []
    for init_state in (0, 40):
        env.reset(options={"init_state": init_state})
        outcomes.append(episode(env, Expert(env, seed=init_state))[0])
    env.close()
    assert all(outcomes)


def test_covers_enough_and_refuses_the_rest_by_name() -> None:
    tasks = expert_tasks()
    assert sum(map(len, tasks.values())) >= 10
    assert set(tasks) == {"libero_object", "libero_spatial", "libero_goal"}
    env = LiberoEnv("libero_goal", 7, render="none")
    with pytest.raises(UserError, match=r"^task_ids: .* libero_goal task 7 \(turn on the stove\); it can do "):
        Expert(env, seed=0)
    env.close()


def test_servo_points_at_its_target_and_is_still_there() -> None:
    rng = np.random.default_rng(0)
    down = np.diag([1.0, -1.0, -1.0])
    for _ in range(100):
        here, target = rng.uniform(-1, 1, (2, 3))
        action = servo(here, down, target, 0.0, 1.0)
        assert np.abs(action).max() <= 1.0
        assert (np.sign(action[:3]) == np.sign(target - here)).all()
    np.testing.assert_array_equal(servo(here, down, here, 0.0, -1.0), [0, 0, 0, 0, 0, 0, -1])


def test_fingers_turn_the_short_way() -> None:
    rng = np.random.default_rng(0)
    for yaw, reference in rng.uniform(-7, 7, (200, 2)):
        angle = turn(yaw, reference)
        assert abs(angle) <= np.pi / 2 + 1e-9
        assert np.isclose(np.sin(reference + angle - yaw), 0.0, atol=1e-9)


def test_disturbances_are_seeded_and_average_out() -> None:
    action = np.array([0.2, -0.1, 0.0, 0.0, 0.0, 0.1, 1.0], dtype=np.float32)

    def run(seed: int, scale: float = 0.2, slip_share: float = 0.0) -> np.ndarray:
        disturb = Disturbance(seed, scale, slip_share)
        return np.array([disturb(action, free=True, carrying=True) for _ in range(150)])

    np.testing.assert_array_equal(run(3), run(3))
    assert not np.array_equal(run(3), run(4))
    np.testing.assert_array_equal(run(3, scale=0.0), np.tile(action, (150, 1)))
    many = np.array([run(seed) for seed in range(100)])
    np.testing.assert_allclose(many.mean(axis=(0, 1)), action, atol=0.02)
    assert (many[..., 6] == 1.0).all(), "no slips were asked for"
    slipping = np.array([run(seed, slip_share=0.5)[:, 6].min() < 0 for seed in range(100)])
    assert 0.3 < slipping.mean() < 0.7
