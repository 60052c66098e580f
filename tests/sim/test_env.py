"""The environment against plain LIBERO, and its states against everything that must not change them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence

from dtvla.errors import UserError
from dtvla.sim.backend import gl_backend
from dtvla.sim.env import LiberoEnv, axis_angle
from dtvla.sim.rendering import Snapshot

pytestmark = pytest.mark.sim

SUITE, TASK, INIT, SIZE = "libero_goal", 7, 3, 128  # fixtures placed at random, and a stove that changes its looks
STEPS = 15


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.clip(np.cumsum(rng.normal(0.0, 0.4, (STEPS, 7)), axis=0), -1.0, 1.0)


@pytest.fixture(scope="module")
def plain(actions: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """States, pictures and proprioception from LIBERO's own environment, in a process without dtvla."""
    folder = tmp_path_factory.mktemp("plain")
    np.save(folder / "actions.npy", actions)
    script = Path(__file__).with_name("plain_libero.py")
    arguments = [SUITE, TASK, INIT, SIZE, folder / "actions.npy", folder / "out.npz"]
    environment = os.environ | {"MUJOCO_GL": gl_backend()}
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True, env=environment)
    with np.load(folder / "out.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def full() -> Iterator[LiberoEnv]:
    env = LiberoEnv(SUITE, TASK, image_size=SIZE)
    yield env
    env.close()


def trace(env: LiberoEnv, actions: np.ndarray, init_state: int = INIT, seed: int = 0) -> np.ndarray:
    """Physics states (S + 1, 1 + nq + nv) of an episode, one action at a time."""
    env.reset(seed=seed, options={"init_state": init_state})
    states = [env.physics()]
    for action in actions:
        env.step(action)
        states.append(env.physics())
    return np.array(states)


def same(first: Any, second: Any) -> bool:
    return bool(data_equivalence(first, second, exact=True))


def test_equals_plain_libero_bit_for_bit(full: LiberoEnv, plain: dict[str, np.ndarray], actions: np.ndarray) -> None:
    observation, _ = full.reset(options={"init_state": INIT})
    for step in range(STEPS + 1):
        if step > 0:
            observation, *_ = full.step(actions[step - 1])
        np.testing.assert_array_equal(full.physics(), plain["states"][step])
        for key in ("agentview", "wrist", "state"):
            np.testing.assert_array_equal(observation[key], plain[key][step], err_msg=f"{key} at step {step}")


def test_a_recorded_state_stands_in_for_an_init_state(full: LiberoEnv) -> None:
    full.reset(options={"init_state": INIT})
    settled = full.physics()
    full.reset(options={"state": full.init_states_NS[INIT]})
    np.testing.assert_array_equal(full.physics(), settled)
    with pytest.raises(ValueError, match="state"):
        full.reset(options={"state": settled[:-1]})


def test_states_are_equal_on_fresh_and_used_environments_and_for_every_render_quality(
    full: LiberoEnv, actions: np.ndarray, plain: dict[str, np.ndarray]
) -> None:
    """The stove's pose is drawn at reset and not held by init states: the seed alone must decide it."""
    for quality in ("none", "draft"):
        env = LiberoEnv(SUITE, TASK, image_size=SIZE, render=quality)  # type: ignore[arg-type]
        other = trace(env, -actions, init_state=11, seed=5)  # leave as much behind as possible
        assert not np.array_equal(other, plain["states"])
        for _ in range(2):
            np.testing.assert_array_equal(trace(env, actions), plain["states"])
        env.close()
    seeded = trace(full, actions[:5], seed=5)
    trace(full, -actions, init_state=11, seed=2)
    np.testing.assert_array_equal(trace(full, actions[:5], seed=5), seeded)


def test_a_chunk_equals_its_steps_and_renders_once(
    full: LiberoEnv, actions: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.reset(options={"init_state": INIT})
    by_step = [full.step(action) for action in actions[:10]]
    full.reset(options={"init_state": INIT})
    rendered: list[str] = []
    assert full._renderer is not None
    render = full._renderer.render

    def counted(snapshot: Snapshot, camera: str) -> np.ndarray:
        rendered.append(camera)
        return render(snapshot, camera)

    monkeypatch.setattr(full._renderer, "render", counted)
    *by_chunk, info = full.step_chunk(actions[:10])
    assert sorted(rendered) == ["agentview", "robot0_eye_in_hand"]
    assert same(tuple(by_chunk), by_step[-1][:4])
    assert info == {"success": False, "step": 10, "steps": 10}


def test_recorded_frames_are_the_observations_of_the_steps(full: LiberoEnv, actions: np.ndarray) -> None:
    full.reset(options={"init_state": INIT})
    pictures = [full.step(action)[0] for action in actions[:3]]
    full.reset(options={"init_state": INIT})
    frames = full.step_chunk(actions[:3], record=True)[-1]["frames"]
    for frame, picture in zip(frames, pictures, strict=True):
        assert frame.shape == (SIZE, 2 * SIZE, 3)
        np.testing.assert_array_equal(frame, np.hstack([picture["agentview"], picture["wrist"]]))


def test_observations_fit_the_space_and_the_callers_random_numbers_are_left_alone(full: LiberoEnv) -> None:
    np.random.seed(123)
    expected = np.random.random(4)
    np.random.seed(123)
    observation, info = full.reset(options={"init_state": 0})
    np.testing.assert_array_equal(np.random.random(4), expected)
    assert full.observation_space.contains(observation)
    assert full.action_space.shape == (7,)
    assert info == {"success": False, "step": 0}
    assert observation["instruction"] == "turn on the stove"


def test_the_step_limit_truncates_and_ends_the_episode() -> None:
    env = LiberoEnv("libero_goal_lan", 0, render="none", max_steps=4, settle_steps=0)  # its instruction has a ’
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(7))
    env.reset()
    observation, reward, terminated, truncated, info = env.step_chunk(np.zeros((10, 7)))
    assert set(observation) == {"state", "instruction"}
    assert env.observation_space.contains(observation)
    assert (reward, terminated, truncated, info["steps"], info["step"]) == (0.0, False, True, 4, 4)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(7))
    env.reset()
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="^action"):
            env.step(bad)
    with pytest.raises(UserError, match="render"):
        env.render()
    with pytest.raises(UserError, match=r"^init_states: 50 .*use 0 to 49$"):
        env.reset(options={"init_state": 50})
    env.close()
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"render": "fast"}, r"^render: 'fast' is unknown; use full, draft or none$"),
        ({"protocol": "mine"}, "^protocol: 'mine'"),
        ({"image_size": 0}, "^image_size: 0 "),
        ({"max_steps": 0}, "^max_steps: 0 "),
        ({"stepping": "quick"}, "^stepping: 'quick' is unknown; use exact or fast$"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LiberoEnv("libero_object", 0, **settings)


def test_axis_angle_turns_the_same_way_as_its_quaternion() -> None:
    """Against a matrix built from the quaternion; antipodes keep their own angle."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(3)
    for quaternion in rng.normal(size=(50, 4)):
        quaternion /= np.linalg.norm(quaternion)
        ours = Rotation.from_rotvec(axis_angle(quaternion)).as_matrix()
        np.testing.assert_allclose(ours, Rotation.from_quat(quaternion, scalar_first=True).as_matrix(), atol=1e-9)
    assert np.linalg.norm(axis_angle(np.array([-0.5, 0.5, 0.5, 0.5]))) > np.pi
    np.testing.assert_array_equal(axis_angle(np.array([1.0, 0.0, 0.0, 0.0])), np.zeros(3))


def test_quiet_no_home_no_prompt_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from dtvla.sim.env import LiberoEnv
import dtvla.sim.expert, dtvla.sim.pool, dtvla.cot.schema
env = LiberoEnv("libero_object", 0, image_size=64, render="draft", settle_steps=1)
env.reset()
assert "torch" not in sys.modules, "torch was imported"
"""
    home = tmp_path / "home"
    home.mkdir()
    dropped = ("MPLCONFIGDIR", "MUJOCO_GL", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    dropped += ("MESA_SHADER_CACHE_DISABLE", "MESA_SHADER_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        cwd=tmp_path,
        env=environment | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("wanted", ["glx", ""])
def test_an_unusable_renderer_is_one_clear_error(wanted: str, tmp_path: Path) -> None:
    """An unknown MUJOCO_GL, and a machine where no OpenGL library can be loaded."""
    code = """
import sys
class NoOpenGL:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "OpenGL":
            raise ImportError("libGL.so: cannot open shared object file")
sys.meta_path.insert(0, NoOpenGL())
from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
try:
    LiberoEnv("libero_object", 0)
except UserError as error:
    print(error)
"""
    environment = os.environ | {"MUJOCO_GL": wanted, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("MUJOCO_GL: 'glx'" if wanted else "renderer: no OpenGL context from egl")
    assert wanted or "libosmesa6" in done.stdout
