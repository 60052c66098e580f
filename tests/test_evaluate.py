"""``dtvla evaluate`` from the command line's settings to results.json, on the real LIBERO with a fresh nano policy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.rollout.evaluation import evaluate, make_plan, worker_count
from dtvla.rollout.results import read_results
from dtvla.rollout.shared_pool import close_shared_pool

LIMIT = 12
FAST = ["env.task_ids=[0]", "env.render=draft", "env.image_size=64", f"env.max_steps={LIMIT}", "cot.max_tokens=6"]


def config(checkpoint: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("evaluate", [f"checkpoint={checkpoint}", *FAST, *overrides])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with fresh weights: it moves, and solves nothing."""
    from dtvla.data.normalization import Statistics
    from dtvla.policy.policy import build_policy

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = compose("train", ["model=nano"]).model
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(200, 8)), rng.uniform(-1, 1, (200, 7)))
    texts = ["pick up the alphabet soup and place it in the basket", "the gripper is above the soup and moves down"]
    folder = tmp_path_factory.mktemp("run") / "nano" / "policy"
    build_policy(settings, texts, statistics).save(folder)
    return folder


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two episode records agree in everything but time."""
    return {**a, "latency": 0, "video": 0} == {**b, "latency": 0, "video": 0}


@pytest.mark.sim
@pytest.mark.slow
def test_evaluation_is_complete_repeatable_and_independent_of_workers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["init_states=[30,7]"]
    try:
        rate = evaluate(config(checkpoint, *settings, f"output={tmp_path / 'two'}", "workers=2"))
        thought = read_document(tmp_path / "two")
        evaluate(config(checkpoint, *settings, f"output={tmp_path / 'random'}", "workers=2", "cot=random", "record=0"))
        evaluate(config(checkpoint, *settings, f"output={tmp_path / 'one'}", "workers=1", "record=[7]"))
        evaluate(config(checkpoint, *settings, f"output={tmp_path / 'random1'}", "workers=1", "cot=random", "record=0"))
    finally:
        close_shared_pool()
    check_document(thought, checkpoint, rate)
    alone, random, random_alone = (read_document(tmp_path / name) for name in ("one", "random", "random1"))
    for one, two in ((alone, thought), (random_alone, random)):
        assert all(same(a, b) for a, b in zip(one["episodes"], two["episodes"], strict=True))
    assert not any(same(a, b) for a, b in zip(random["episodes"], thought["episodes"], strict=True))
    assert [bool(e["video"]) for e in thought["episodes"]] == [True, False]
    assert [bool(e["video"]) for e in alone["episodes"]] == [False, True]
    for name, document in (("two", thought), ("one", alone), ("random", random)):
        assert all((tmp_path / name / e["video"]).is_file() for e in document["episodes"] if e["video"])
    shown = capsys.readouterr().out
    assert "0/2" in shown
    assert str(tmp_path / "two" / "results.json") in shown
    check_finished_results_are_kept(checkpoint, tmp_path / "two", capsys)


def read_document(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


def check_document(document: dict[str, Any], checkpoint: Path, rate: float) -> None:
    """Everything that stands behind the numbers is in the file."""
    from dtvla.policy.policy import Policy

    assert rate == 0.0
    every = document["totals"]["all"]
    assert (every["successes"], every["episodes"], every["low"]) == (0, 2, 0.0)
    assert every["high"] == pytest.approx(0.6576, abs=1e-4)  # Wilson's upper end for 0 of 2
    assert [e["init_state"] for e in document["episodes"]] == [30, 7]
    for episode in document["episodes"]:
        assert episode["steps"] == LIMIT
        assert [t["step"] for t in episode["thoughts"]] == [0, 10]
        assert all(seconds > 0 for seconds in episode["latency"])
    provenance = document["provenance"]
    assert provenance["versions"]["mujoco"] == "3.3.2"
    assert provenance["config"]["env"]["suite"] == "libero_object"
    assert provenance["machine"]["cores"] >= 1
    statistics = Policy.load(checkpoint).processor.normalizer.statistics
    assert provenance["statistics_sha256"] == statistics.digest()


def check_finished_results_are_kept(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command shows them; another one is refused."""
    before = (output / "results.json").read_bytes()
    assert evaluate(config(checkpoint, "init_states=[30,7]", f"output={output}")) == 0.0
    assert "Already evaluated" in capsys.readouterr().out
    for change in (["init_states=[30,8]"], ["init_states=[30,7]", "cot=mask"], ["init_states=[30,7]", "seed=1"]):
        with pytest.raises(UserError, match="holds another run .* is not overwritten"):
            evaluate(config(checkpoint, *change, f"output={output}"))
    assert (output / "results.json").read_bytes() == before
    assert read_results(output).total().episodes == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["init_states=[30,50]"], "init_states: 50 is not an init state; libero_object task 0 has 0 to 49"),
        (["init_states=[-1]"], "init_states: -1 is not an init state"),
        (["init_states=[]"], "init_states: .* is empty or repeats"),
        (["init_states=[3,3]"], "init_states: .* is empty or repeats"),
        (["env.task_ids=[10]"], "task_ids: 10 is not a task of libero_object"),
        (["env.suite=libero_objekt"], "suite: 'libero_objekt' is not a LIBERO suite.*libero_object"),
        (["env.protocol=mine"], "protocol: 'mine' is unknown"),
        (["workers=0"], "workers: 0 is not a number of processes"),
        (["batch_size=none"], "batch_size: 'none' is not a number of observations"),
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
    import shutil

    other = tmp_path / "policy"
    shutil.copytree(checkpoint, other)
    text = (other / "policy.json").read_text()
    assert '"wrist"' in text
    (other / "policy.json").write_text(text.replace('"wrist"', '"front"'))
    with pytest.raises(UserError, match="looks through front, but LIBERO here has agentview, wrist"):
        evaluate(config(other, f"output={tmp_path / 'out'}"))


def test_modes_and_suites_have_folders_of_their_own_named_by_the_run(checkpoint: Path) -> None:
    outputs = [
        make_plan(config(checkpoint, *change)).output
        for change in ([], ["cot=mask"], ["env=libero_goal", "cot=random"])
    ]
    assert [path.as_posix().split("evaluations/")[1] for path in outputs] == [
        "nano/libero_object-think", "nano/libero_object-mask", "nano/libero_goal-random",
    ]  # fmt: skip


def test_all_init_states_of_the_benchmark_are_the_default(checkpoint: Path) -> None:
    assert make_plan(config(checkpoint)).init_states == list(range(50))


def test_workers_are_no_more_than_cores_or_episodes() -> None:
    assert worker_count("auto", 1) == 1
    assert 1 <= worker_count("auto", 1000) <= 4096
    assert worker_count(8, 3) == 3
