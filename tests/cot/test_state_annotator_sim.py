"""The annotator that performs episodes again, in the real simulator: the same bits, told without a fault."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libero_files import write_demo_file

from dtvla.cot.annotator import Job
from dtvla.cot.episodes import AnnotatedFrames, EpisodeView
from dtvla.cot.objects import task_objects
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.cot.state_annotator import StateAnnotator
from dtvla.cot.temporal import Temporal, TemporalSettings
from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
from dtvla.sim.expert import Expert
from dtvla.sim.retrace import placing_goals
from dtvla.sim.suites import get_task

PICTURES: dict[str, Any] = {"render": "draft", "image_size": 32, "settle_steps": 10}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of the expert; the fingers slip in the second one."""
    from dtvla.collect import collect
    from dtvla.data.expert_source import ExpertRequest

    settings: dict[str, Any] = {"suite": "libero_goal", "task_ids": (1,), "episodes": 2, "init_states": (0, 1)}
    request = ExpertRequest(**settings, **PICTURES, seed=34, max_steps=300, max_attempts=3)
    root = tmp_path_factory.mktemp("expert") / "set"
    collect(request, root, workers=1)
    return root


def recorded(env: LiberoEnv) -> tuple[np.ndarray, np.ndarray]:
    """States and actions of a success and of the way back from it, with pauses at two places."""
    env.reset(options={"init_state": 4})
    expert = Expert(env, seed=0, noise=0.0)
    states, actions, past = [], [], 0
    while past < 20:
        states.append(env.physics())
        decided = np.asarray(expert.act().executed, dtype=np.float64) if past == 0 else WAY_BACK
        actions.append(decided)
        past += bool(env.step(decided)[-1]["success"] or past)
    pauses = np.array(actions)[[9, 39]] * ([0.0] * 6 + [1.0])
    return np.insert(states, [10, 40], [states[10], states[40]], axis=0), np.insert(actions, [10, 40], pauses, axis=0)


WAY_BACK = np.array([0.0, 0.0, 0.3, 0.0, 0.0, 0.0, -1.0])


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of one replayed recording, and the folder with the recording."""
    from dtvla.collect import collect
    from dtvla.data.hdf5_source import replay_request

    folder, task = tmp_path_factory.mktemp("replays"), get_task("libero_goal", 1)
    env = LiberoEnv("libero_goal", 1, render="none", max_steps=400, ends_at_success=False)
    write_demo_file(folder / "demos/libero_goal", task, {"demo_3": recorded(env)})
    env.close()
    request = replay_request(
        folder / "demos", "libero_goal", [1], None, noop_threshold=1e-4, failed_replays="drop", **PICTURES
    )
    collect(request, folder / "set", workers=1)
    return folder / "set", folder / "demos"


@pytest.fixture(scope="module")
def annotator() -> Iterator[StateAnnotator]:
    found = StateAnnotator(workers=1, tolerance=0.0)
    yield found
    found.close()


def told(annotator: StateAnnotator, episode: EpisodeView) -> dict[int, str]:
    """Thoughts of all frames, which pass every check."""
    schema, objects = Schema(SchemaSettings()), task_objects(episode)
    thoughts = {}
    for frame, answer in enumerate(annotator.label(episode, [Job(frame) for frame in range(len(episode))])):
        thoughts[frame], violations = schema.read(answer.text, objects)
        assert violations == [], (frame, answer.text)
    assert Temporal(TemporalSettings()).check(thoughts, episode.closing_F) == {}
    return thoughts


@pytest.mark.sim
@pytest.mark.slow
def test_episodes_of_the_expert_are_performed_bit_for_bit_and_told_without_a_fault(
    demonstrations: Path, annotator: StateAnnotator
) -> None:
    data = AnnotatedFrames(demonstrations)
    failed = []
    for number in (1, 0):  # the second one begins in an environment that was used
        thoughts = told(annotator, data[number])
        assert len(thoughts) == len(data[number])
        failed.append(sum("the grasp failed" in thought for thought in thoughts.values()))
    assert failed[0] > 0 == failed[1]


@pytest.mark.sim
@pytest.mark.slow
def test_a_replayed_recording_is_performed_bit_for_bit_and_told_to_the_end(replays: tuple[Path, Path]) -> None:
    root, demos = replays
    annotator = StateAnnotator(workers=1, tolerance=0.0, demos=demos)
    thoughts = list(told(annotator, AnnotatedFrames(root)[0]).values())
    annotator.close()
    assert "move above the black bowl" in thoughts[0]
    assert "the black bowl is let go at the stove" in thoughts[-1]
    assert len(set(thoughts)) >= 8


@pytest.mark.sim
@pytest.mark.slow
def test_a_dataset_with_a_wrong_seed_is_refused_and_a_killed_process_says_what_to_do(demonstrations: Path) -> None:
    annotator = StateAnnotator(workers=1)
    episode = AnnotatedFrames(demonstrations)[0]
    episode.source = {**episode.source, "seed": 12345}
    with pytest.raises(UserError, match=r"the replay of episode 0 .* leaves it at frame \d"):
        annotator.label(episode, [Job(0)])
    (pid,) = annotator._pool._processes  # type: ignore[union-attr]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match="annotator.workers: a process with a simulator was killed"):
        annotator.label(episode, [Job(0)])
    annotator.close()


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("task_id", [0, 7])
def test_a_task_about_something_else_than_placing_is_refused_by_name(task_id: int) -> None:
    env = LiberoEnv("libero_goal", task_id, render="none")
    try:
        with pytest.raises(
            UserError, match=rf"libero_goal task {task_id} .* asks for (open|turnon) .*annotator=openai"
        ):
            placing_goals(env)
    finally:
        env.close()
