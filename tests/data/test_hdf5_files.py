"""LIBERO's demonstration files: which actions are kept, which files are found, and what is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from libero_files import Recording, write_demo_file

from dtvla.collect import collect
from dtvla.data.collection import Workspace
from dtvla.data.hdf5_files import find_files, kept_actions, read_demo, read_index
from dtvla.data.hdf5_source import ReplayRequest, replay_request
from dtvla.data.staging import EpisodeSource, dropped_path, save_dropped
from dtvla.data.takes import Clock
from dtvla.errors import UserError
from dtvla.sim.env import SimulationDiverged
from dtvla.sim.suites import get_task, load_init_states

TASK = get_task("libero_goal", 6)
SIZE = load_init_states(TASK).shape[1]
SETTINGS: dict[str, Any] = {
    "render": "draft",
    "image_size": 32,
    "settle_steps": 2,
    "noop_threshold": 1e-4,
    "failed_replays": "drop",
}


def recording(steps: int, seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, SIZE)), rng.uniform(-1, 1, (steps, 7))


@pytest.fixture
def demo_file(tmp_path: Path) -> Path:
    names = {"demo_0": 3, "demo_1": 4, "demo_2": 5, "demo_10": 6}
    return write_demo_file(tmp_path / "libero_goal", TASK, {name: recording(n, n) for name, n in names.items()})


def test_no_ops_are_actions_without_motion_that_leave_the_gripper_as_the_last_kept_one_told_it() -> None:
    move, rest, faint = [0.5, 0, 0, 0, 0, 0], [0.0] * 6, [0.9e-4, 0, 0, 0, 0, 0]
    recorded = [
        (rest, 1),  # the first: by its motion alone, whatever the gripper
        (faint, -1),
        (move, -1),
        (rest, -1),
        (rest, 1),  # the gripper closes
        (faint, 1),
        (rest, -1),  # and opens
        (rest, -1),
        ([1.1e-4, 0, 0, 0, 0, 0], -1),
        ([0.8e-4, 0.8e-4, 0, 0, 0, 0], -1),  # the norm counts, not each number
    ]
    actions = np.array([[*motion, gripper] for motion, gripper in recorded])
    np.testing.assert_array_equal(kept_actions(actions, 1e-4), actions[[2, 4, 6, 8, 9]])
    np.testing.assert_array_equal(kept_actions(actions, None), actions)
    assert kept_actions(actions[:2], 1e-4).shape == (0, 7)


def test_recordings_are_listed_by_number_and_limited(demo_file: Path) -> None:
    index = read_index(demo_file, TASK, None)
    assert (index.task_id, index.demos, index.lengths) == (6, ("demo_0", "demo_1", "demo_2", "demo_10"), (3, 4, 5, 6))
    assert read_index(demo_file, TASK, 2).demos == ("demo_0", "demo_1")
    first_state, actions = read_demo(demo_file, "demo_10")
    states, recorded = recording(6, 6)
    np.testing.assert_array_equal(first_state, states[0])
    np.testing.assert_array_equal(actions, recorded)


def test_files_are_found_below_the_suites_folder_in_a_folder_and_alone(demo_file: Path, tmp_path: Path) -> None:
    expected = {6: demo_file}
    assert find_files(tmp_path, "libero_goal", [6]) == expected
    assert find_files(demo_file.parent, "libero_goal", [6]) == expected
    assert find_files(demo_file, "libero_goal", None) == expected


def test_what_is_not_there_or_of_another_suite_is_named(demo_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demos: .*nowhere does not exist"):
        find_files(tmp_path / "nowhere", "libero_goal", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="demos: .*empty holds no file"):
        find_files(tmp_path / "empty", "libero_goal", None)
    with pytest.raises(UserError, match=f"libero_object has no task of the name of {demo_file.name}"):
        find_files(demo_file, "libero_object", None)
    with pytest.raises(UserError, match=r"nothing for libero_goal tasks \[0, 1, 2, 3, 4, 5, 7, 8, 9\]"):
        find_files(tmp_path, "libero_goal", None)
    with pytest.raises(UserError, match=r"nothing for libero_goal tasks \[3\]"):
        find_files(tmp_path, "libero_goal", [3, 6])


def spoil(change: Callable[[h5py.Group], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file["data/demo_2"])

    return apply


def put(key: str, values: np.ndarray) -> Callable[[Path], None]:
    def change(demo: h5py.Group) -> None:
        del demo[key]
        demo[key] = values

    return spoil(change)


def not_finite(steps: int, width: int, frame: int) -> np.ndarray:
    values = np.zeros((steps, width))
    values[frame, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"<html>not found</html>"), "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "can't be read"),
        (lambda path: h5py.File(path, "w").close(), "holds no data/demo_0"),
        (spoil(lambda demo: demo.pop("actions")), "demo_2 has no actions"),
        (spoil(lambda demo: demo.pop("states")), "demo_2 has no states"),
        (put("actions", np.zeros((5, 6))), r"demo_2 has actions of shape \(5, 6\)"),
        (put("actions", np.zeros((0, 7))), r"demo_2 has actions of shape \(0, 7\)"),
        (put("actions", not_finite(5, 7, 4)), r"demo_2 has actions that are not finite \(frame 4\)"),
        (put("states", not_finite(5, SIZE, 0)), "demo_2 has states that are not finite"),
        (put("states", np.zeros((5, SIZE - 1))), f"demo_2 has states of shape .*{SIZE} numbers"),
    ],
)
def test_a_damaged_file_is_refused_with_the_name_of_the_recording(
    demo_file: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(demo_file)
    with pytest.raises(UserError, match=f"demos: .*{message}"):
        replay_request(demo_file, "libero_goal", None, None, **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("noop_threshold", -1e-4), ("noop_threshold", 3), ("noop_threshold", "few"), ("failed_replays", "maybe")],
)
def test_settings_out_of_range_are_named(demo_file: Path, setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=setting):
        replay_request(demo_file, "libero_goal", None, None, **{**SETTINGS, setting: value})


@pytest.mark.parametrize("count", [0, "all"])
def test_a_limit_that_is_no_number_of_recordings_is_named(demo_file: Path, count: Any) -> None:
    with pytest.raises(UserError, match="max_demos"):
        replay_request(demo_file, "libero_goal", None, count, **SETTINGS)


@pytest.fixture
def request_(demo_file: Path) -> ReplayRequest:
    return replay_request(demo_file, "libero_goal", None, None, **SETTINGS)


def test_plans_go_through_all_recordings_and_the_request_does_not_tell_where_files_lie(request_: ReplayRequest) -> None:
    plans = request_.plans()
    assert [(plan.episode_index, plan.task_id, plan.demo) for plan in plans] == [
        (0, 6, "demo_0"),
        (1, 6, "demo_1"),
        (2, 6, "demo_2"),
        (3, 6, "demo_10"),
    ]
    assert request_.environment()["max_steps"] == 6
    assert request_.to_dict()["files"] == {f"{TASK.name}_demo.hdf5": {"demos": 4, "actions": 18}}


def test_a_collection_of_which_nothing_is_left_ends_with_a_message(request_: ReplayRequest, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "set", request_)
    with workspace.open():
        for plan in request_.plans():
            source = EpisodeSource(
                plan.episode_index, "libero_goal", 6, "do", demo=plan.demo, success=False, dropped="not solved"
            )
            save_dropped(source, dropped_path(workspace.folder, plan.episode_index))
    with pytest.raises(UserError, match=r"none of 4 replays .*the first: not solved"):
        collect(request_, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    damaged = dropped_path(workspace.folder, 1)
    damaged.write_text(json.dumps({"no": "source"}))
    assert list(workspace.staged()) == [0, 2, 3]
    assert not damaged.exists()


def test_replays_that_diverge_or_have_nothing_to_do_are_dropped(request_: ReplayRequest, demo_file: Path) -> None:
    def diverge(action: np.ndarray) -> None:
        raise SimulationDiverged("position 3 is not finite")

    observation = {"state": np.zeros(8), "agentview": None, "wrist": None}
    env: Any = SimpleNamespace(reset=lambda **_: (observation, {"success": False}), step=diverge)
    take = replace(request_, failed_replays="keep").perform(env, request_.plans()[2], Clock())
    assert take.dropped == "position 3 is not finite"
    put("actions", np.zeros((5, 7)))(demo_file)
    take = request_.perform(env, request_.plans()[2], Clock())
    assert take.dropped == "every action is a no-op"
    assert take.facts == {"file": demo_file.name, "demo": "demo_2", "noops": 5, "success": False}
