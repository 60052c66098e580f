import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digests import digests
from forked import Command

from dtvla.collect import collect
from dtvla.cores import worker_count
from dtvla.data.collection import Workspace
from dtvla.data.collection_record import collection_record
from dtvla.data.expert_source import ExpertRequest, check_thoughts
from dtvla.data.staging import EpisodeSource, episode_path
from dtvla.errors import UserError

REQUEST = ExpertRequest(
    suite="libero_object",
    task_ids=(0, 3),
    episodes=4,
    init_states=(0, 1, 2),
    seed=5,
    render="draft",
    image_size=64,
    settle_steps=10,
    max_steps=400,
    max_attempts=3,
)


def test_plans_cycle_init_states_task_by_task_and_seeds_are_a_pure_function() -> None:
    plans = REQUEST.plans()
    assert [plan.episode_index for plan in plans] == list(range(8))
    assert [plan.task_id for plan in plans] == [0] * 4 + [3] * 4
    assert [plan.init_state for plan in plans] == [0, 1, 2, 0] * 2
    seeds = [REQUEST.expert_seed(plan, attempt) for plan in plans for attempt in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [REQUEST.expert_seed(plan, attempt) for plan in plans for attempt in range(3)]
    # An episode does not depend on what else is collected.
    alone = replace(REQUEST, task_ids=(3,), episodes=2)
    assert alone.expert_seed(alone.plans()[1], 0) == REQUEST.expert_seed(plans[5], 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("episodes", 0), ("init_states", ()), ("task_ids", ()), ("task_ids", (1, 1)), ("render", "none"), ("seed", -1)],
)
def test_settings_out_of_range_are_named(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=setting):
        replace(REQUEST, **{setting: value})


def test_worker_count() -> None:
    assert worker_count("auto", 1) == 1
    assert worker_count("auto", 1000) == len(os.sched_getaffinity(0))
    assert worker_count(3, 100) == 3
    with pytest.raises(UserError, match="workers"):
        worker_count("many", 5)


def test_a_finished_dataset_is_reported_for_the_same_request_and_kept_from_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    (root / "meta").mkdir(parents=True)
    source = EpisodeSource(0, "libero_object", 0, "do", 0, 1, 100, 1, seconds={"encode": 1.0})
    sources = [replace(source, episode_index=i, task_id=plan.task_id) for i, plan in enumerate(REQUEST.plans())]
    record = collection_record(REQUEST, sources, "python -m dtvla.collect", seconds=12.0)
    assert record["attempts"] == 16
    assert record["success_rate"] == 0.5
    assert record["steps"] == 800
    (root / "meta/collection.json").write_text(json.dumps(record))
    assert collect(REQUEST, root) == record
    assert "already collected" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"episodes=4 \(asked: 5\)"):
        collect(replace(REQUEST, episodes=5), root)
    (root / "meta/collection.json").write_text("{}")
    with pytest.raises(UserError, match="not made by collect"):
        collect(REQUEST, root)


def test_a_begun_collection_is_not_mixed_with_another_request_nor_entered_twice(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "set", REQUEST)
    with (
        workspace.open(),
        pytest.raises(UserError, match="another process"),
        Workspace(tmp_path / "set", REQUEST).open(),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"seed=5 \(asked: 6\)"),
        Workspace(tmp_path / "set", replace(REQUEST, seed=6)).open(),
    ):
        pass
    damaged = episode_path(workspace.folder, 2)
    damaged.write_bytes(b"PK not really")
    (workspace.folder / "episode_000001.npz.77.tmp").write_bytes(b"half")
    with workspace.open():
        assert workspace.staged() == {}
    assert not damaged.exists()
    assert not list(workspace.folder.glob("*.tmp"))


def test_a_thought_that_breaks_the_schema_names_episode_and_frame() -> None:
    good = "the alphabet soup is on the right and the gripper is open. next, move above the alphabet soup and stop."
    check_thoughts([good] * 3, ["alphabet soup"], episode_index=2)
    with pytest.raises(UserError, match=r"episode 2, frame 3: has 2 words.*'too short'"):
        check_thoughts([good, good, good, "too short", good], ["alphabet soup"], episode_index=2)


def test_a_recording_process_imports_no_torch() -> None:
    code = "import sys, dtvla.collect, dtvla.data.collection_worker, dtvla.data.recording, dtvla.sim.expert\n"
    code += "import dtvla.data.expert_source, dtvla.data.hdf5_source, h5py\n"
    subprocess.run([sys.executable, "-c", code + "assert not {'torch', 'lerobot'} & set(sys.modules)"], check=True)


# -- the real simulator, in processes of their own -------------------------------------------------------------------


def settings(root: Path, *options: str, episodes: int = 3) -> list[str]:
    common = ["env=libero_object", "env.task_ids=[0]", f"episodes={episodes}", f"root={root}", "env.image_size=64"]
    return [*common, "render=draft", *options]


def command(root: Path, *options: str, episodes: int = 3) -> list[str]:
    return [sys.executable, "-m", "dtvla.collect", *settings(root, *options, episodes=episodes)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collected") / "whole"
    done = subprocess.run(command(root), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "3 episodes, expert succeeded in 3/" in done.stdout
    assert "Error" not in done.stderr
    return root


@pytest.mark.sim
@pytest.mark.slow
def test_collected_episodes_are_whole_and_varied(uninterrupted: Path) -> None:
    from dtvla.data.demonstrations import Demonstrations

    demonstrations = Demonstrations(uninterrupted)
    assert demonstrations.episodes == 3
    assert {source["init_state"] for source in demonstrations.sources} == {0, 1, 2}
    assert np.abs(demonstrations.action_FD).max() <= 1
    assert set(np.unique(demonstrations.action_FD[:, 6])) == {-1, 1}
    assert demonstrations.instructions == ["pick up the alphabet soup and place it in the basket"]
    assert len(demonstrations.texts()) > 4
    record = json.loads((uninterrupted / "meta/collection.json").read_text())
    assert record["steps"] == len(demonstrations)
    assert 0 < record["success_rate"] <= 1
    assert record["versions"]["mujoco"] == "3.3.2"
    assert not Path(f"{uninterrupted}.partial").exists()


def small_disk(folder: Path, kilobytes: int) -> bool:
    """Mount a file system of that size, where the system allows it."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and subprocess.run(["mount", *options], capture_output=True).returncode == 0


@pytest.mark.sim
@pytest.mark.slow
def test_after_a_full_disk_and_kill_9_the_same_command_makes_the_uninterrupted_dataset(
    uninterrupted: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    mounted = small_disk(disk, 150)  # one episode of pictures of 64 x 64 fits, two do not
    limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    root = disk / "set"
    try:
        full = subprocess.run(command(root, "workers=1"), capture_output=True, text=True, timeout=280, preexec_fn=limit)
        assert full.returncode == 2, full.stderr
        assert full.stderr.strip().splitlines()[-1].startswith("error: root: no space left while writing")
        assert "Traceback" not in full.stderr
        if mounted:
            assert len(list(disk.glob("set.partial/episode_*.npz"))) == 1
            subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        begun = len(list(disk.glob("set.partial/episode_*.npz")))
        process = subprocess.Popen(command(root, "workers=1"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while len(list(disk.glob("set.partial/episode_*.npz"))) == begun and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {path: path.stat().st_mtime_ns for path in disk.glob("set.partial/episode_*.npz")}
        assert 0 < len(kept) < 3
        last = Command("collect", *settings(root, "workers=1"))
        assert last.wait(280)
        assert last.returncode == 0, last.written()
        assert digests(root, "collection.json") == digests(uninterrupted, "collection.json"), "but how long it took"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.slow
@pytest.mark.sim
def test_an_expert_that_keeps_failing_ends_the_collection_with_one_message(tmp_path: Path) -> None:
    options = ("workers=1", "max_steps=5", "max_attempts=2")
    done = subprocess.run(command(tmp_path / "set", *options, episodes=1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: max_attempts: the expert failed 2 times at episode 0 (libero_object task 0")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["env=libero_spatial", "env.task_ids=[4]"], "can't do libero_spatial task 4"),
        (["env.task_ids=[11]"], "11"),
        (["init_states=[3,50]"], "init_states: [50] do not exist"),
    ],
)
def test_what_can_not_be_collected_is_refused_before_the_simulator_starts(
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
