"""Import of LIBERO's own demonstrations, on files that the scripted expert filled, in the real simulator."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digests import digests
from forked import Command
from libero_files import Recording, write_demo_file

from dtvla.collect import collect
from dtvla.data.hdf5_source import replay_request
from dtvla.data.takes import Clock
from dtvla.errors import UserError
from dtvla.sim.backend import gl_backend
from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Expert
from dtvla.sim.suites import get_task

SUITE, TASK_ID = "libero_goal", 6
TASK = get_task(SUITE, TASK_ID)
BACKING_OUT = [0.0, 0.0, 0.3, 0.0, 0.0, 0.0, -1.0]


def record(env: LiberoEnv, init_state: int) -> Recording:
    """An undisturbed success, and five steps more, as recordings have them."""
    env.reset(options={"init_state": init_state})
    expert = Expert(env, seed=init_state, noise=0.0)
    states, actions, success, past = [], [], False, 0
    while past < 5:
        states.append(env.physics())
        actions.append(np.array(BACKING_OUT) if success else np.asarray(expert.act().executed, dtype=np.float64))
        success |= env.step(actions[-1])[-1]["success"]
        past += success
    return np.array(states), np.array(actions)


def with_no_ops(recording: Recording, places: list[int]) -> Recording:
    """The same with pauses before these frames; before frame 0 the gripper is commanded shut, which does not count."""
    states, actions = recording
    pauses = actions[[max(0, place - 1) for place in places]] * ([0.0] * 6 + [1.0])
    pauses[np.array(places) == 0, 6] = 1.0
    return np.insert(states, places, states[places], axis=0), np.insert(actions, places, pauses, axis=0)


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recording]:
    """What is left of each recording without its no-ops. The one in the middle stops before the task is solved."""
    env = LiberoEnv(SUITE, TASK_ID, render="none", max_steps=300, ends_at_success=False)
    first, second = record(env, 0), record(env, 1)
    env.close()
    return {"demo_0": first, "demo_2": (first[0][:25], first[1][:25]), "demo_10": second}


@pytest.fixture(scope="module")
def demos(recordings: dict[str, Recording], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demos")
    pauses = {"demo_0": [0, 0, 12, 30, 30], "demo_2": [0, 7, 8, 24], "demo_10": []}
    write_demo_file(folder / SUITE, TASK, {name: with_no_ops(recordings[name], pauses[name]) for name in recordings})
    return folder


def settings(demos: Path, root: Path, *options: str) -> list[str]:
    common = ["source=hdf5", f"demos={demos}", f"env={SUITE}", f"env.task_ids=[{TASK_ID}]", f"root={root}"]
    return [*common, "env.image_size=64", "render=draft", *options]


def command(demos: Path, root: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "dtvla.collect", *settings(demos, root, *options)]


@pytest.fixture(scope="module")
def imported(demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imported") / "set"
    done = subprocess.run(command(demos, root), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "2 episodes, 2/3 replays succeeded (67 %)" in done.stdout
    assert "task 6: 1 dropped, 9 no-ops left out" in done.stdout
    assert "Error" not in done.stderr
    return root


@pytest.mark.sim
@pytest.mark.slow
def test_the_dataset_has_the_kept_actions_of_successful_replays_and_says_what_was_dropped(
    imported: Path, recordings: dict[str, Recording]
) -> None:
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/set", root=imported)
    kept = np.concatenate([recordings["demo_0"][1], recordings["demo_10"][1]])
    columns = dataset.hf_dataset.with_format("numpy")
    np.testing.assert_array_equal(np.stack(columns["action"]), kept.astype(np.float32))
    assert set(columns["reasoning"]) == {""}
    assert dataset.num_episodes == 2
    last = dataset[len(kept) - 1]
    assert last["task"] == "put the cream cheese in the bowl"
    assert tuple(last["observation.images.wrist_image"].shape) == (3, 64, 64)
    record = json.loads((imported / "meta/collection.json").read_text())
    assert (record["episodes"], record["attempts"], record["steps"]) == (2, 3, len(kept))
    assert record["noops_by_task"] == {"6": 9}
    name = f"{TASK.name}_demo.hdf5"
    dropped = {"task_id": 6, "file": name, "demo": "demo_2", "steps": 25, "noops": 4}
    assert record["dropped"] == [{**dropped, "dropped": "the task was not solved at the end of the replay"}]
    lines = [json.loads(line) for line in (imported / "meta/episodes_source.jsonl").read_text().splitlines()]
    common = {"suite": SUITE, "task_id": 6, "file": name, "success": True}
    assert lines == [
        {**common, "episode_index": 0, "demo": "demo_0", "noops": 5, "steps": len(recordings["demo_0"][1])},
        {**common, "episode_index": 1, "demo": "demo_10", "noops": 0, "steps": len(recordings["demo_10"][1])},
    ]


@pytest.mark.sim
@pytest.mark.slow
def test_an_import_that_is_killed_continues_with_what_it_has(imported: Path, demos: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    process = subprocess.Popen(command(demos, root, "workers=1"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("set.partial/episode_000001.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in sorted(tmp_path.glob("set.partial/episode*"))] == [
        "episode_000000.npz",
        "episode_000001.json",
    ]
    last = Command("collect", *settings(demos, root))
    output, errors = last.wait(280)
    assert last.returncode == 0, errors
    assert "2 episodes, 2/3 replays succeeded" in output
    assert digests(root, "collection.json") == digests(imported, "collection.json"), "but how long it took"


@pytest.mark.sim
@pytest.mark.slow
def test_a_finished_import_is_reported_and_never_overwritten(
    imported: Path, demos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"render": "draft", "image_size": 64, "settle_steps": 10, "failed_replays": "drop"}
    before = digests(imported)
    same = replay_request(demos, SUITE, [TASK_ID], None, noop_threshold=1e-4, **settings)
    assert collect(same, imported)["episodes"] == 2
    assert "already collected" in capsys.readouterr().out
    other = replay_request(demos, SUITE, [TASK_ID], 2, noop_threshold=None, **settings)
    with pytest.raises(UserError, match=r"files=.*noop_threshold=0.0001 \(asked: None\)"):
        collect(other, imported)
    assert digests(imported) == before


@pytest.mark.sim
@pytest.mark.slow
def test_frames_equal_what_plain_libero_gives_when_the_field_regenerates(demos: Path, tmp_path: Path) -> None:
    """State and both pictures before each kept action, bit for bit; a failed replay is kept where that is asked for."""
    path = demos / SUITE / f"{TASK.name}_demo.hdf5"
    settings: dict[str, Any] = {"render": "full", "image_size": 64, "settle_steps": 10, "failed_replays": "keep"}
    request = replay_request(path, SUITE, None, None, noop_threshold=1e-4, **settings)
    env = LiberoEnv(SUITE, TASK_ID, **request.environment())
    take = request.perform(env, request.plans()[1], Clock())
    env.close()
    script = Path(__file__).parent / "sim" / "plain_replay.py"
    arguments = [path, "demo_2", TASK.bddl_file, 64, tmp_path / "out.npz"]
    environment = os.environ | {"MUJOCO_GL": gl_backend()}
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True, env=environment)
    with np.load(tmp_path / "out.npz") as plain:
        assert len(plain["action"]) == 25
        np.testing.assert_array_equal(take.actions, plain["action"].astype(np.float32))
        np.testing.assert_array_equal(take.states, plain["state"])
        for camera in ("agentview", "wrist"):
            np.testing.assert_array_equal(take.pictures[camera], plain[camera])
        assert not plain["success"]
    assert take.dropped is None
    assert take.thoughts == [""] * 25
    assert take.facts == {"file": path.name, "demo": "demo_2", "noops": 4, "success": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["source=hdf5"], "demos: source=hdf5 needs a file or folder"),
        (["source=hdf5", "demos=nowhere"], "demos: nowhere does not exist"),
        (["demos=somewhere"], "demos: somewhere is not read by source=expert"),
        (["source=video"], "source: 'video' is unknown; use expert or hdf5"),
    ],
)
def test_what_can_not_be_imported_is_refused_before_the_simulator_starts(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtvla.collect", f"root={tmp_path}/set", *options],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
