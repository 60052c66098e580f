"""Protects training on thoughts alone as a whole: the run ends in a policy, and its metrics are of thoughts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from training_data import TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.policy.policy import Policy


def run(*overrides: str) -> float | None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train(compose("train", overrides=list(overrides)))


def settings(root: Path) -> list[str]:
    data = write_demonstrations(root / "squares", episodes=3, frames=9)
    quiet = ("data.num_workers=0", "data.cache=false", "callbacks.samples.frames=1", "logger=csv")
    steps = ("trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1")
    return [*TINY, *quiet, *steps, f"data.root={data}", f"paths.root={root}"]


def test_a_run_on_thoughts_alone_lowers_their_loss_and_reports_nothing_of_actions(tmp_path: Path) -> None:
    final = run(*settings(tmp_path), "algorithm.loss.actions=false", "data.frames=thoughts", "name=thoughts")
    with (tmp_path / "runs/thoughts/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [name for name in rows[0] if "action" in name]
    losses = [float(row["train/loss"]) for row in rows]
    assert losses == [float(row["train/thought_loss"]) for row in rows]
    assert losses[-1] < losses[0]
    assert final == pytest.approx(float(rows[-1]["val/loss"]))
    assert all(np.isfinite(float(row["val/thought_accuracy"])) for row in rows if row["val/loss"])
    assert Policy.load(tmp_path / "runs/thoughts/policy").processor.layout.slots == 70  # it is a policy like any other


def test_thoughts_alone_of_a_dataset_without_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algorithm.loss.actions: false"):
        run(*settings(tmp_path), "algorithm.loss.actions=false", "data.thoughts=false", "name=nothing")
    assert not (tmp_path / "runs").exists()
