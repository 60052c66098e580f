"""Protects GRPO in real LIBERO: what it logs, that a killed training continues exactly, and that ranks train as one."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from ranks import ON_CPU, interrupted, run, train_on
from safetensors.torch import load_file
from training_data import TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.learning.grpo_experiment import open_inputs

pytestmark = [pytest.mark.sim, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS_OF_ITERATION, STEPS = 4, 8
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def settings(root: Path) -> list[str]:
    """From a policy that ends some of its thoughts itself: well-formed ones are what it is rewarded for here."""
    demonstrations = write_demonstrations(root / "squares", frames=16)
    common = [*TINY, f"paths.root={root}", "trainer.limit_val_batches=0", "optimized_metric=null", "logger=csv"]
    run(*common, f"data.root={demonstrations}", "name=start", "trainer.max_steps=200", "callbacks=none")
    tiny = [one for one in TINY if not one.startswith("data.")]
    return [
        "+experiment=grpo_quickstart",
        *tiny,
        f"paths.root={root}",
        f"model.checkpoint={root}/runs/start/policy",
        "logger=csv",
        "env=libero_object",
        "env.task_ids=[0]",
        "env.render=draft",
        "env.max_steps=25",
        "data.groups=2",
        "data.group_size=3",
        "data.keep_success=null",
        "data.temperature=1.2",
        "data.workers=1",
        "algorithm.reward.format=1",
        "algorithm.kl.weight=0.01",
        "algorithm.ppo_epochs=2",
        "algorithm.mini_batches=2",
        "algorithm.micro_batch_size=3",
        "algorithm.optimizer.warmup_steps=0",
        "algorithm.optimizer.lr={language_model:1e-4,vision_tower:1e-4,projector:1e-4}",
        f"trainer.max_steps={STEPS}",
        "callbacks.checkpoint.keep_every_n_steps=2",
        "callbacks=grpo",
        "~callbacks.libero_rollouts",
    ]


@pytest.fixture(scope="module")
def whole(settings: list[str], root: Path) -> Path:
    run(*settings, "name=whole")
    return root / "runs" / "whole"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        found = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in found if "train/loss" in row]


def test_an_iteration_logs_what_happened_and_trains_on_what_was_sampled(whole: Path) -> None:
    logged = rows(whole)
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    first = [row for row in logged if "sampled/success" in row]
    assert [row["step"] for row in first] == [1, 1 + STEPS_OF_ITERATION]
    for row in first:
        assert row["sampled/episodes"] == 6
        assert row["sampled/steps"] == 25
        assert row["sampled/log_prob_gap"] <= row["sampled/log_prob_gap_max"] < 1e-4
        assert row["train/clipped_above"] == row["train/clipped_below"] == 0  # ratios are 1
        assert 0 < row["sampled/thought_entropy"] < math.log(20_000)
    assert any(row["sampled/group_spread"] > 0 for row in first)
    assert any(row["train/grad_norm"] > 0 and row["train/update_kl"] > 0 for row in logged)
    assert all("time/collect_s" in row for row in logged if row["step"] % STEPS_OF_ITERATION == 0)
    before = load_file(whole.parent / "start" / "policy" / "model.safetensors")
    assert not all(torch.equal(weight, before[name]) for name, weight in weights(whole).items())
    assert len(list((whole / "groups").iterdir())) <= 2


def test_a_training_killed_in_the_middle_of_updates_continues_exactly(whole: Path, settings: list[str]) -> None:
    copy = interrupted(whole, STEPS_OF_ITERATION + 2, "in-updates")
    run(*settings, "name=in-updates", "resume=true")
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(copy).items())


def test_a_training_killed_while_it_collects_continues_exactly(whole: Path, settings: list[str]) -> None:
    copy = interrupted(whole, STEPS_OF_ITERATION, "in-collection")
    begun = copy / "groups" / "iteration-0001"
    (begun / "groups.json").unlink()
    episodes = sorted(begun.glob("*.safetensors"))
    for lost in episodes[1:]:
        lost.unlink()
    kept = episodes[0].stat().st_mtime_ns
    run(*settings, "name=in-collection", "resume=true")
    assert episodes[0].stat().st_mtime_ns == kept
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(copy).items())


def test_a_training_whose_episodes_are_lost_in_the_middle_of_updates_says_so(whole: Path, settings: list[str]) -> None:
    copy = interrupted(whole, STEPS_OF_ITERATION + 2, "lost")
    shutil.rmtree(copy / "groups")
    with pytest.raises(UserError, match="groups"):
        run(*settings, "name=lost", "resume=true")


def test_two_ranks_with_shared_out_weights_and_reference_train_as_one_process(whole: Path, settings: list[str]) -> None:
    fsdp = ["trainer=fsdp", *ON_CPU, "trainer.limit_val_batches=0", f"trainer.max_steps={STEPS}"]
    train_on(2, [*settings, *fsdp, "trainer.log_every_n_steps=1", "name=fsdp"])
    found, expected = weights(whole.with_name("fsdp")), weights(whole)
    assert found.keys() == expected.keys()
    assert max(float((weight - expected[name]).abs().max()) for name, weight in found.items()) < ROUNDING
    for one, other in zip(rows(whole.with_name("fsdp")), rows(whole), strict=True):
        for name in ("train/loss", "train/kl", "train/tokens", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), (name, one["step"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.stop_at_log_ratio=1e-12", "stop_at_log_ratio: in step 1 a token's log-ratio"),
        ("algorithm.optimizer.lr.language_model=1e30", "not finite"),
    ],
)
def test_a_training_that_goes_astray_stops_and_saves_the_batch(
    whole: Path, settings: list[str], override: str, message: str
) -> None:
    folder = whole.with_name("astray-" + override.split("=")[0].rsplit(".", 1)[-1])
    first = "groups/iteration-0000"
    shutil.copytree(whole / first, folder / first)  # the same start makes the same episodes
    with pytest.raises(UserError, match=message):
        run(*settings, override, f"name={folder.name}")
    [saved] = (folder / "stopped").iterdir()
    batch = load_file(saved)
    assert batch["part0/old_BT"].shape == batch["part0/labels_BT"].shape


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.group_size=1"], "data.group_size"),
        (["data.init_states=[3,30]"], "data.init_states: 30 are held out"),
        (["trainer.max_steps=9"], "trainer.max_steps: 9 is not a multiple of the 4 steps"),
        (["algorithm.mini_batches=7"], "algorithm.mini_batches: 7 of 6 episodes"),
        (["model.checkpoint=null"], "model.checkpoint: null, but GRPO refines"),
        (["algorithm.kl.place=nowhere"], "algorithm.kl.place"),
        (["algorithm.kl.target=0.1", "algorithm.kl.weight=0"], "algorithm.kl.target"),
        (["algorithm.loss.weighting=mean"], "algorithm.loss.weighting"),
        (["+algorithm.reference.bits=8"], "algorithm.reference: unknown setting bits"),
        (["algorithm.reference.offload=true", "algorithm.reference.quantize=8bit"], "algorithm.reference: quantize"),
    ],
)
def test_impossible_settings_are_refused_before_anything_starts(
    settings: list[str], overrides: list[str], message: str
) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[*settings, *overrides])
    with pytest.raises(UserError, match=message):
        open_inputs(cfg)


def test_demonstrations_are_not_what_grpo_learns_from(settings: list[str]) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=["algorithm=grpo", "model.checkpoint=somewhere"])
    with pytest.raises(UserError, match="data=rollouts"):
        train(cfg)
