"""The annotator that performs episodes again: whose word it takes, what it refuses, and that it speaks sense."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libero_files import write_demo_file
from puppet import Puppet

from dtvla.cli import config_dir
from dtvla.cot.annotator import Job
from dtvla.cot.objects import task_objects
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.cot.state_annotator import StateAnnotator, recipe, require_same, tell
from dtvla.cot.temporal import Temporal, TemporalSettings
from dtvla.errors import UserError
from dtvla.sim.retrace import Recipe, Retraced
from dtvla.sim.scene import Goal
from dtvla.sim.suites import get_task, load_init_states

TASK = get_task("libero_goal", 8)  # put the bowl on the plate
GOALS = [Goal("on", "akita_black_bowl_1", "plate_1"), Goal("in", "alphabet_soup_1", "basket_1_contain_region")]
EXPERT = {"suite": "libero_goal", "task_id": 8, "init_state": 3, "seed": 7, "attempt": 0}
RECORDED = {"suite": "libero_goal", "task_id": 8, "file": f"{TASK.name}_demo.hdf5", "demo": "demo_2"}


Recording = tuple[Any, Path, np.ndarray, np.ndarray]


@dataclass
class Episode:
    """An episode without a dataset around it."""

    root: Path
    closing_F: np.ndarray
    source: dict[str, Any] = field(default_factory=lambda: dict(EXPERT))
    number: int = 4
    instruction: str = TASK.instruction

    def __post_init__(self) -> None:
        rng = np.random.default_rng(len(self.closing_F))
        self.action_FD = rng.uniform(-1, 1, (len(self.closing_F), 7)).astype(np.float32)
        self.state_FD = rng.normal(size=(len(self.closing_F), 8)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.closing_F)


def performed(puppet: Puppet, root: Path) -> tuple[Any, Retraced]:
    closing_F, track = puppet.end()
    episode: Any = Episode(root, closing_F)
    return episode, Retraced(GOALS, track, episode.state_FD.copy())


def placed() -> Puppet:
    """A grasp that fails, then a placement."""
    puppet = Puppet()
    puppet.go(puppet.items[0], closing=False)
    puppet.squeeze(None)
    puppet.let_go()
    puppet.pick(0)
    puppet.put(0)
    puppet.let_go()
    return puppet


def collected(root: Path, **request: Any) -> Path:
    """The record that a collection leaves."""
    (root / "meta").mkdir(parents=True)
    (root / "meta/collection.json").write_text(json.dumps({"request": {"settle_steps": 10, **request}}))
    return root


# -- where an episode comes from -----------------------------------------------------------------------------------


def test_an_expert_episode_is_performed_as_its_collection_says(tmp_path: Path) -> None:
    episode: Any = Episode(collected(tmp_path, settle_steps=4), np.zeros(33, dtype=bool))
    assert recipe(episode, None) == Recipe(
        suite="libero_goal", task_id=8, settle_steps=4, frames=33, init_state=3, seed=7
    )


@pytest.mark.parametrize(
    ("source", "missing"),
    [({}, "'suite' of episode 4"), ({k: v for k, v in EXPERT.items() if k != "seed"}, "'seed' of episode 4")],
)
def test_an_episode_without_a_source_is_refused_by_name(tmp_path: Path, source: dict[str, Any], missing: str) -> None:
    episode: Any = Episode(collected(tmp_path), np.zeros(5, dtype=bool), source)
    with pytest.raises(UserError, match=f"dataset: .* lacks {missing}.*annotator=openai"):
        recipe(episode, None)


@pytest.mark.parametrize("content", [None, "", "{}", '{"request": 3}'])
def test_a_dataset_of_others_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "meta").mkdir()
    if content is not None:
        (tmp_path / "meta/collection.json").write_text(content)
    episode: Any = Episode(tmp_path, np.zeros(5, dtype=bool))
    with pytest.raises(UserError, match="lacks meta/collection.json; .*annotator=policy"):
        recipe(episode, None)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """An episode that replays a recording without its no-ops, the folder, first state and kept actions."""
    rng = np.random.default_rng(5)
    states = rng.normal(size=(12, load_init_states(TASK).shape[1]))
    actions = rng.uniform(-1, 1, (12, 7))
    actions[[3, 7], :6], actions[[3, 7], 6] = 0, actions[[2, 6], 6]
    others = {name: (states + 1, actions[::-1].copy()) for name in ("demo_0", "demo_1")}
    write_demo_file(tmp_path / "demos/libero_goal", TASK, {**others, "demo_2": (states, actions)})
    kept = np.delete(actions, [3, 7], axis=0)
    episode: Any = Episode(collected(tmp_path / "set", noop_threshold=1e-4), kept[:, 6] > 0, dict(RECORDED))
    episode.action_FD = kept.astype(np.float32)
    return episode, tmp_path / "demos", states[0], kept


def test_a_recording_is_performed_from_its_first_state_without_its_no_ops(
    recording: Recording,
) -> None:
    episode, demos, first_state, kept = recording
    found: Any = recipe(episode, demos)
    assert (found.suite, found.task_id, found.frames, found.seed) == ("libero_goal", 8, 10, None)
    np.testing.assert_array_equal(found.first_state, first_state)
    np.testing.assert_array_equal(found.actions_F7, kept)


def test_a_recording_that_is_missing_or_another_one_is_refused_by_name(
    recording: Recording,
) -> None:
    episode, demos, _, _ = recording
    with pytest.raises(UserError, match=r"annotator.demos: episode 4 of .* replays demo_2 of put_the_bowl"):
        recipe(episode, None)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        recipe(episode, demos / "nowhere")
    for demo, message in (("demo_1", "demo_1 of .* holds other actions"), ("demo_9", "holds no demo_9")):
        with pytest.raises(UserError, match=f"annotator.demos: .*{message}"):
            recipe(replace(episode, source=RECORDED | {"demo": demo}), demos)


# -- what is made of it ----------------------------------------------------------------------------------------------


def test_the_first_frame_of_a_replay_that_went_another_way_is_named(tmp_path: Path) -> None:
    episode: Any = Episode(tmp_path, np.zeros(30, dtype=bool))
    require_same(episode, episode.state_FD, 0.0)
    state_F8 = episode.state_FD.copy()
    state_F8[20:, 2] += 0.5
    state_F8[11, 7] += 3e-4
    require_same(episode, state_F8, 1.0)
    for tolerance, frame in ((1e-4, 11), (1e-3, 20)):
        with pytest.raises(UserError, match=rf"episode 4 of .* at frame {frame} \(its state is \S+ off\)"):
            require_same(episode, state_F8, tolerance)
    state_F8[5, 0] = np.nan
    with pytest.raises(UserError, match="at frame 5 "):
        require_same(episode, state_F8, 1.0)


def test_what_is_told_passes_every_check(tmp_path: Path) -> None:
    episode, retraced = performed(placed(), tmp_path)
    thoughts = tell(episode, retraced, 3)
    assert len(thoughts) == len(episode)
    schema, objects = Schema(SchemaSettings()), task_objects(episode)
    for thought in set(thoughts):
        assert schema.read(f"<think>{thought}</think>", objects) == (thought, [])
    assert Temporal(TemporalSettings()).check(dict(enumerate(thoughts)), episode.closing_F) == {}
    assert sum("the grasp failed" in thought for thought in thoughts) > 3
    assert "is let go at the plate" in thoughts[-1]


def test_two_placements_pass_the_temporal_checks_and_name_what_is_at_hand(tmp_path: Path) -> None:
    puppet = Puppet()
    for item in (1, 0):
        puppet.pick(item)
        puppet.put(item)
        puppet.let_go()
        puppet.go(puppet.hand + [0.0, 0.0, 0.2], closing=False)
    episode, retraced = performed(puppet, tmp_path)
    thoughts = tell(episode, retraced, 3)
    assert Temporal(TemporalSettings()).check(dict(enumerate(thoughts)), episode.closing_F) == {}
    assert "alphabet soup" in thoughts[0]
    assert "black bowl" in thoughts[-1]


def test_an_item_that_was_pushed_to_its_target_is_not_told_as_if_it_was_carried(tmp_path: Path) -> None:
    episode, retraced = performed(placed(), tmp_path)
    track = replace(retraced.track, held_FG=np.zeros_like(retraced.track.held_FG))
    with pytest.raises(UserError, match="episode 4 .* akita_black_bowl_1 comes to plate_1 without being grasped"):
        tell(episode, replace(retraced, track=track), 3)


def test_a_thought_says_where_things_are_at_its_frame(tmp_path: Path) -> None:
    episode, retraced = performed(placed(), tmp_path)
    item_FG3, target_FG3 = retraced.track.item_FG3.copy(), retraced.track.target_FG3.copy()
    item_FG3[:, 0], target_FG3[:, 0] = [0.2, 0.2, 0.0], [-0.3, -0.2, 0.0]
    target_FG3[2, 0] = [0.0, 0.0, 0.0]
    track = replace(retraced.track, item_FG3=item_FG3, target_FG3=target_FG3)
    thoughts = tell(episode, replace(retraced, track=track), 3)
    assert thoughts[1].startswith("the black bowl is at the far left and the plate is at the near right.")
    assert thoughts[2].startswith("the black bowl is at the far left and the plate is in the middle.")


class Performed(StateAnnotator):
    """Knows how each episode went."""

    asked = 0
    known: Retraced

    def _retrace(self, wanted: Recipe) -> Retraced:
        self.asked += 1
        return self.known


def test_answers_come_in_the_order_of_the_jobs_and_an_episode_is_performed_once(tmp_path: Path) -> None:
    episode, retraced = performed(placed(), collected(tmp_path))
    annotator = Performed(workers=1)
    annotator.known = retraced
    jobs = [Job(frame) for frame in (40, 0, 12)] + [Job(12, 1, ("is wrong",))]
    answers = annotator.label(episode, jobs)
    thoughts = tell(episode, retraced, 3)
    assert [answer.text for answer in answers] == [f"<think>{thoughts[job.frame]}</think>" for job in jobs]
    annotator.label(episode, jobs)
    assert annotator.asked == 1
    annotator.label(replace(episode, number=5), jobs)
    assert annotator.asked == 2
    annotator.known = replace(retraced, state_F8=retraced.state_F8 + 1)
    with pytest.raises(UserError, match="leaves it at frame 0"):
        annotator.label(replace(episode, number=6), jobs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "annotator.workers: 0"),
        ({"workers": "many"}, "annotator.workers: 'many'"),
        ({"debounce": 0}, "annotator.debounce: 0"),
        ({"tolerance": -1.0}, "annotator.tolerance: found -1.0"),
        ({"tolerance": float("nan")}, "annotator.tolerance: found nan"),
        ({"tolerance": "small"}, "annotator.tolerance: found 'small'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StateAnnotator(**settings)


def test_the_shipped_settings_make_an_annotator() -> None:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("annotate", overrides=["annotator=state", "keyframes.debounce=5"])
    annotator = instantiate(cfg.annotator)
    assert isinstance(annotator, StateAnnotator)
    assert annotator.identity == {"annotator": "state", "model": None, "prompt": None, "debounce": 5}
    assert (annotator.jobs_per_call, annotator.calls) == (None, len(os.sched_getaffinity(0)))


def test_a_process_with_a_simulator_imports_no_torch_and_hindsight_no_simulator() -> None:
    for module, absent in (("sim.retrace", "torch"), ("cot.state_annotator", "mujoco"), ("cot.hindsight", "mujoco")):
        code = f"import sys, dtvla.{module}; assert '{absent}' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


ABANDONS = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from dtvla.sim.retrace import start_worker
pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_worker)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 100)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_process_with_a_simulator_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ABANDONS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert parent.wait(60) == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while running(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = running(worker)
        if left:
            os.kill(worker, signal.SIGKILL)
        assert not left
