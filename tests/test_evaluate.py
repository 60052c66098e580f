"""``dtvla evaluate`` from the command line's settings to results.json, on the real LIBERO with a fresh nano policy."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Command
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dtvla.cli import config_dir
from dtvla.cores import worker_count
from dtvla.errors import UserError
from dtvla.rollout.evaluation import ACTION_DIM, CAMERAS, evaluate
from dtvla.rollout.plan import make_plan
from dtvla.rollout.results import read_results
from dtvla.rollout.shared_pool import close_shared_pool

LIMIT = 12
FAST = ["env.task_ids=[0]", "env.render=draft", "env.image_size=64", f"env.max_steps={LIMIT}", "cot.max_tokens=6"]
STATES = "init_states=[30,7,12,3]"


def config(checkpoint: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("evaluate", [f"checkpoint={checkpoint}", *FAST, *overrides])


def save_policy(folder: Path, action_dim: int = 7) -> Path:
    """A policy with fresh weights: it moves, and solves nothing."""
    from dtvla.data.normalization import Statistics
    from dtvla.policy.policy import build_policy

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = compose("train", ["model=nano"]).model
    settings.action_dim, settings.normalizer_mask = action_dim, settings.normalizer_mask[-action_dim:]
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(200, 8)), rng.uniform(-1, 1, (200, action_dim)))
    texts = ["pick up the alphabet soup and place it in the basket", "the gripper is above the soup and moves down"]
    build_policy(settings, texts, statistics).save(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("run") / "nano" / "policy")


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Results of two workers that nobody disturbed."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert evaluate(config(checkpoint, STATES, f"output={folder}", "workers=2")) == 0.0
    yield folder
    close_shared_pool()


def episodes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_bytes().split(b"\n")[:-1]]


def document(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def timeless(folder: Path) -> list[dict[str, Any]]:
    """Episodes without what differs from run to run: time, and which of them were filmed."""
    return [{**episode, "latency": len(episode["latency"]), "video": None} for episode in episodes(folder)]


@pytest.mark.sim
def test_a_random_thought_gives_other_actions_and_the_chosen_episode_is_filmed(
    checkpoint: Path, evaluated: Path, tmp_path: Path
) -> None:
    evaluate(config(checkpoint, "init_states=[30,7]", "cot=random", f"output={tmp_path}", "workers=2", "record=[7]"))
    pairs = zip(episodes(evaluated), episodes(tmp_path), strict=False)
    for thought, random in pairs:
        assert thought["init_state"] == random["init_state"]
        assert thought["thoughts"] != random["thoughts"]
    assert [bool(e["video"]) for e in episodes(evaluated)] == [True, False, False, False]
    assert [bool(e["video"]) for e in episodes(tmp_path)] == [False, True]
    for folder in (evaluated, tmp_path):
        assert all((folder / e["video"]).stat().st_size for e in episodes(folder) if e["video"])


@pytest.mark.sim
@pytest.mark.slow
def test_a_killed_run_continues_in_two_processes_of_torchrun_and_ends_as_if_undisturbed(
    checkpoint: Path, evaluated: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    settings = [f"checkpoint={checkpoint}", *FAST, STATES, f"output={output}", "device=cpu"]
    run = Command("evaluate", *settings, "workers=1")
    try:
        while not (output / "episodes.jsonl").exists() or not episodes(output):
            assert run.returncode is None, "it ended before an episode was on disk"
            time.sleep(0.01)
    finally:
        run.end()
    kept = episodes(output)
    assert 1 <= len(kept) < 4
    assert not (output / "results.json").exists()
    with (output / "episodes.jsonl").open("ab") as file:
        file.write(b'{"suite": "libero_ob')  # as if the kill had hit a line that was being written
    with pytest.raises(UserError, match="run.json holds another run .other cot. and is not overwritten"):
        evaluate(config(checkpoint, STATES, f"output={output}", "cot=mask"))

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, "-m", "dtvla.evaluate", *settings], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{len(kept)} of 4 episodes were finished before") == 1
    assert done.stdout.count("0/4") == 1, "one process shows the table"
    assert timeless(output) == timeless(evaluated)
    assert all(episode in episodes(output) for episode in kept), "a finished episode ran again"
    assert document(output)["totals"] == document(evaluated)["totals"]
    assert document(output)["settings"] == document(evaluated)["settings"]
    assert len(document(output)["provenance"]["resumed"]) == 1
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in evaluated.iterdir())


@pytest.mark.sim
def test_everything_that_stands_behind_the_numbers_is_in_the_files(checkpoint: Path, evaluated: Path) -> None:
    from dtvla.policy.policy import Policy

    found = document(evaluated)
    every = found["totals"]["all"]
    assert (every["successes"], every["episodes"], every["low"]) == (0, 4, 0.0)
    assert every["high"] == pytest.approx(0.4899, abs=1e-4)  # Wilson's upper end for 0 of 4
    assert [e["init_state"] for e in episodes(evaluated)] == [30, 7, 12, 3]
    for episode in episodes(evaluated):
        assert episode["steps"] == LIMIT
        assert [t["step"] for t in episode["thoughts"]] == [0, 10]
        assert all(seconds > 0 for seconds in episode["latency"])
    env = {"suite": "libero_object", "task_ids": [0], "init_states": [30, 7, 12, 3], "seed": 0, "max_steps": LIMIT,
           "protocol": "published", "settle_steps": 10, "render": "draft", "image_size": 64, "stepping": "exact",
           "quantize": None}  # fmt: skip
    assert env.items() <= found["settings"].items()
    assert {"cot", "compat", "checkpoint_sha256"} <= set(found["settings"])
    provenance = found["provenance"]
    assert provenance["versions"]["mujoco"] == "3.3.2"
    assert provenance["config"]["env"]["suite"] == "libero_object"
    assert provenance["machine"]["cores"] >= 1
    assert (provenance["device"], provenance["dtype"], provenance["resumed"]) == ("cpu", "float32", [])
    statistics = Policy.load(checkpoint).processor.normalizer.statistics
    assert provenance["statistics_sha256"] == statistics.digest()


@pytest.mark.sim
def test_finished_results_are_shown_again_and_never_overwritten(
    checkpoint: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in evaluated.iterdir() if path.is_file()}
    assert evaluate(config(checkpoint, STATES, f"output={evaluated}")) == 0.0
    shown = capsys.readouterr().out
    assert "Already evaluated" in shown
    assert "0/4" in shown
    assert str(evaluated / "results.json") in shown
    for change in (["init_states=[30,8]"], [STATES, "cot=mask"], [STATES, "seed=1"], [STATES, "env.stepping=fast"]):
        with pytest.raises(UserError, match="holds another run .* is not overwritten"):
            evaluate(config(checkpoint, *change, f"output={evaluated}"))
    assert {path: path.read_bytes() for path in evaluated.iterdir() if path.is_file()} == before
    assert read_results(evaluated).total().episodes == 4


def test_a_run_is_not_continued_with_other_packages_or_another_arithmetic(checkpoint: Path, tmp_path: Path) -> None:
    from dtvla.rollout.journal import begin_run
    from dtvla.rollout.results import versions

    settings = [STATES, f"output={tmp_path}", "device=cpu"]
    plan = make_plan(config(checkpoint, *settings))
    same = {"versions": versions(), "device": "cpu", "dtype": "float32", "resumed": []}
    for change, message in (
        ({"versions": {**versions(), "mujoco": "3.4.0"}}, "begun with mujoco 3.4.0, now 3.3.2; go on"),
        ({"dtype": "bfloat16"}, "begun with dtype bfloat16, now float32"),
        ({"device": "cuda"}, "begun with device cuda, now cpu"),
    ):
        begin_run(tmp_path, plan.settings, {**same, **change})
        with pytest.raises(UserError, match=message):
            evaluate(config(checkpoint, *settings))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["init_states=[30,50]"], "init_states: 50 is not an init state; libero_object task 0 has 0 to 49"),
        (["init_states=[-1]"], "init_states: -1 is not an init state"),
        (["init_states=[]"], "init_states: .* is empty or repeats"),
        (["init_states=[3,3]"], "init_states: .* is empty or repeats"),
        (["seed=[0,0]"], "seed: found .0, 0.; give a whole number of at least 0, or a list of different ones"),
        (["seed=-1"], "seed: found -1"),
        (["seed=1.5"], "seed: found 1.5"),
        (["seed=null"], "seed: found None"),
        (["init_states=half"], "init_states: 'half' is not an init state"),
        (["record=1.5"], "record: 1.5 is neither a number of episodes nor some of the init states"),
        (["env.task_ids=[0,0]"], "env.task_ids: .0, 0. is empty or repeats a task"),
        (["env.render=none"], "env.render: none gives the policy no pictures"),
        (["env.render=best"], "render: 'best' is unknown; use full, draft or none"),
        (["env.stepping=quick"], "stepping: 'quick' is unknown; use exact or fast"),
        (["env.max_steps=0"], "max_steps: 0 is not a number of steps"),
        (["env.settle_steps=-1"], "settle_steps: -1 is not a whole number from 0 on"),
        (["env.task_ids=[10]"], "task_ids: 10 is not a task of libero_object"),
        (["env.suite=libero_objekt"], "suite: 'libero_objekt' is not a LIBERO suite.*libero_object"),
        (["env.protocol=mine"], "protocol: 'mine' is unknown"),
        (["workers=0"], "workers: 0 is not a number from 1 on; use auto"),
        (["batch_size=none"], "batch_size: 'none' is not a number from 1 on"),
        (["threads=many"], "threads: 'many' is not a number from 1 on"),
        (["init_states=[3,4]", "record=[5]"], "record: .5. is neither a number of episodes nor .* init states .3, 4."),
        (["record=-1"], "record: -1 is neither"),
        (["dtype=int4"], "dtype: 'int4' is unknown"),
        (["device=cuda:0"], "device: cuda:0 was asked for but"),
        (["cot.mode=thinks"], "cot.mode: 'thinks' is unknown; did you mean think"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(
    checkpoint: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    import torch

    if change == ["device=cuda:0"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message):
        evaluate(config(checkpoint, *change, f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"checkpoint: no folder {tmp_path / 'no'}"):
        make_plan(config(tmp_path / "no"))
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}: an empty folder"):
        make_plan(config(tmp_path))
    with pytest.raises(UserError, match="checkpoint: none was given; add checkpoint=FOLDER"):
        make_plan(config(Path("???")))


def test_cameras_that_libero_does_not_have_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "policy"
    shutil.copytree(checkpoint, other)
    text = (other / "policy.json").read_text()
    assert '"wrist"' in text
    (other / "policy.json").write_text(text.replace('"wrist"', '"front"'))
    with pytest.raises(UserError, match="looks through front, but LIBERO here has agentview, wrist"):
        evaluate(config(other, f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_actions_of_another_robot_are_refused(tmp_path: Path) -> None:
    other = save_policy(tmp_path / "policy", action_dim=6)
    with pytest.raises(UserError, match="gives actions of 6 numbers, but LIBERO's have 7"):
        evaluate(config(other, f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_has_to_fit_is_what_the_simulator_has() -> None:
    from dtvla.sim import env

    assert (tuple(env.CAMERAS), env.ACTION_DIM) == (CAMERAS, ACTION_DIM)


def test_modes_and_suites_have_folders_of_their_own_named_by_the_run(checkpoint: Path) -> None:
    outputs = [
        make_plan(config(checkpoint, *change)).output
        for change in ([], ["cot=mask"], ["env=libero_goal", "cot=random"])
    ]
    assert [path.as_posix().split("evaluations/")[1] for path in outputs] == [
        "nano/libero_object-think", "nano/libero_object-mask", "nano/libero_goal-random",
    ]  # fmt: skip


def test_all_init_states_of_the_benchmark_are_the_default(checkpoint: Path) -> None:
    plan = make_plan(config(checkpoint))
    assert plan.settings["init_states"] == [spec.init_state for spec in plan.specs] == list(range(50))


def test_workers_are_no_more_than_cores_or_episodes() -> None:
    assert worker_count("auto", 1) == 1
    assert 1 <= worker_count("auto", 1000) <= 4096
    assert worker_count(8, 3) == 3
    assert worker_count("auto", 1000, processes=4096) == 1
