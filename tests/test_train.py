"""Protects training end to end: real data, a tiny model, kills at any time, and what is refused."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Command
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from training_data import INSTRUCTION, TINY, write_demonstrations

from dtvla.callbacks.checkpoint import read_step
from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Policy

STEPS = 30


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demonstrations(tmp_path_factory.mktemp("demonstrations") / "squares")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def settings(demonstrations: Path, root: Path) -> list[str]:
    """Dropout and augmentation are on, so that anything random that is not reproduced would show."""
    return [
        *TINY,
        f"data.root={demonstrations}",
        f"paths.root={root}",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=12",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_steps=7",
        "callbacks.samples.frames=1",
        "data.num_workers=2",
        "+model.text.attention_dropout=0.1",
    ]


def run(*overrides: str) -> float | None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train(compose("train", overrides=list(overrides)))


@pytest.fixture(scope="module")
def uninterrupted(settings: list[str], root: Path) -> Path:
    run(*settings, "name=uninterrupted")
    return root / "runs" / "uninterrupted"


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for_step(training: Command, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while training.returncode is None and time.monotonic() < deadline:
        if (folder / "metrics.csv").is_file() and len(metrics(folder)) >= step:
            return
        time.sleep(0.01)
    training.end()
    raise AssertionError(f"the training did not reach step {step}: {training.written()}")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_training_lowers_the_loss_and_reports_everything(uninterrupted: Path) -> None:
    rows = metrics(uninterrupted)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert float(rows[-1]["train/loss"]) < 0.9 * float(rows[0]["train/loss"])
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [12, 24, 30]
    for name in ("train/action_accuracy", "train/thought_accuracy", "train/action_l1", "train/grad_norm"):
        assert all(np.isfinite(float(row[name])) for row in rows)
    assert all(0 < float(row["lr/language_model"]) <= 3.001e-3 for row in rows)
    assert float(rows[-1]["throughput/samples_per_s"]) > 0
    assert list((uninterrupted / "tensorboard").glob("events.*"))


def test_trained_policy_reloads_and_acts(uninterrupted: Path) -> None:
    policy = Policy.load(uninterrupted / "policy")
    rng = np.random.default_rng(0)
    pictures = {camera: rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for camera in ("agentview", "wrist")}
    decision = policy.act([{**pictures, "instruction": INSTRUCTION}], CotMode(max_tokens=16))[0]
    assert decision.actions_SD.shape == (10, 7)
    assert np.isfinite(decision.actions_SD).all()


@pytest.mark.slow
def test_kill_9_and_resume_end_in_the_same_weights(settings: list[str], root: Path, uninterrupted: Path) -> None:
    folder = root / "runs" / "killed"
    training = Command("train", *settings, "name=killed")
    wait_for_step(training, folder, 17)
    os.kill(training.pid, signal.SIGKILL)
    training.wait(60)
    assert not (folder / "policy").exists()
    saved = read_step(folder / "checkpoints" / "last.ckpt")
    assert 0 < saved < STEPS
    run(*settings, "name=killed", "resume=true")
    assert_same_weights(folder, uninterrupted)
    rows, expected = metrics(folder), metrics(uninterrupted)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in expected]


@pytest.mark.slow
def test_sigterm_saves_first_and_resume_ends_in_the_same_weights(
    settings: list[str], root: Path, uninterrupted: Path
) -> None:
    folder = root / "runs" / "terminated"
    seldom = ["callbacks.checkpoint.every_n_steps=1000", "trainer.val_check_interval=1000"]
    training = Command("train", *settings, *seldom, "name=terminated")
    wait_for_step(training, folder, 8)
    os.killpg(training.pid, signal.SIGTERM)  # loader processes too, as `timeout` and job schedulers do
    output, errors = training.wait(60)
    assert training.returncode == 128 + signal.SIGTERM
    assert "resume=true" in output
    assert "Traceback" not in errors
    saved = read_step(folder / "checkpoints" / "last.ckpt")
    assert saved == len(metrics(folder)) < STEPS
    run(*settings, "name=terminated", "resume=true", "data.num_workers=0")
    assert_same_weights(folder, uninterrupted)


def test_a_finished_run_is_not_overwritten(settings: list[str], uninterrupted: Path) -> None:
    before = (uninterrupted / "policy" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"uninterrupted.*resume=true.*name="):
        run(*settings, "name=uninterrupted")
    assert (uninterrupted / "policy" / "model.safetensors").stat().st_mtime_ns == before


def test_resuming_a_finished_run_returns_its_metric(
    settings: list[str], uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = run(*settings, "name=uninterrupted", "resume=true")
    assert value == pytest.approx(float(metrics(uninterrupted)[-1]["val/loss"]))
    assert "finished" in capsys.readouterr().out


def test_resume_on_changed_data_is_refused(settings: list[str], root: Path, uninterrupted: Path) -> None:
    other: Any = write_demonstrations(root / "other", seed=1)
    with pytest.raises(UserError, match=r"data\.root"):
        run(*settings, "name=uninterrupted", "resume=true", f"data.root={other}")


def test_an_absent_dataset_leaves_no_run_folder(settings: list[str], root: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(*settings, "name=absent", "data.root=/nowhere/at/all")
    assert not (root / "runs" / "absent").exists()


def test_overfitting_one_batch_drives_its_loss_down(settings: list[str]) -> None:
    loss = run(
        *settings,
        "+debug=overfit",
        "trainer.max_steps=60",
        "trainer.val_check_interval=null",
        "data.batch_size=2",
        "data.num_workers=0",
        "model.text.attention_dropout=0",
    )
    assert loss is not None
    assert loss < 3.0
