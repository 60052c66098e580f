"""Protects rollouts during training: real LIBERO episodes are logged, and weights do not depend on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_data import TINY, write_demonstrations

from dtvla.analysis.intervals import wilson
from dtvla.callbacks.libero_rollouts import LiberoRollouts
from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train

LIMIT = 20
ENV = {
    **{"suite": "libero_object", "task_ids": [0], "protocol": "published", "max_steps": LIMIT},
    **{"render": "draft", "stepping": "exact", "image_size": 64, "settle_steps": 10},
}


def run(*overrides: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("train", overrides=list(overrides)))


@pytest.mark.slow
@pytest.mark.sim
def test_rollouts_are_logged_filmed_and_leave_training_alone(tmp_path: Path) -> None:
    settings = [
        *TINY,
        f"data.root={write_demonstrations(tmp_path / 'data')}",
        f"paths.root={tmp_path}",
        "trainer.max_steps=6",
        "trainer.limit_val_batches=0",
        "trainer.log_every_n_steps=2",
        "optimized_metric=null",
        "data.num_workers=0",
        "env.task_ids=[0]",
        "env.render=draft",
        f"env.max_steps={LIMIT}",
        "cot=mask",
        "callbacks.libero_rollouts.init_states=[30]",
    ]
    run(*settings, "name=plain")
    run(*settings, "name=rollouts", "callbacks.libero_rollouts.every_n_epochs=0.25")  # 96 frames in batches of 8
    folder = tmp_path / "runs" / "rollouts"
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rollout/success"]]
    assert [int(row["step"]) for row in rows] == [3, 6]
    expected = wilson(0, 1)
    for row in rows:
        assert (float(row["rollout/success"]), float(row["rollout/episode_length"])) == (0.0, LIMIT)
        assert float(row["rollout/success_low"]) == pytest.approx(expected.low)
        assert float(row["rollout/success_high"]) == pytest.approx(expected.high)
    assert json.loads((folder / "result.json").read_text())["metrics"]["rollout/success"] == 0.0
    assert len(list((folder / "rollouts").rglob("*.mp4"))) == 2
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [image.step for image in events.Images("rollout/episode")] == [3, 6]
    assert events.Images("rollout/episode")[0].encoded_image_string.startswith(b"GIF")
    first, second = (load_file(tmp_path / "runs" / name / "policy/model.safetensors") for name in ("plain", "rollouts"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    best = load_file(folder / "best/model.safetensors")  # of step 3: an equal success later does not replace it
    assert not all(torch.equal(weight, best[name]) for name, weight in second.items())


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ({"suite": "libero_objekt"}, {"init_states": [0]}, "libero_object"),
        ({"task_ids": [99]}, {"init_states": [0]}, "99"),
        ({}, {"init_states": [50]}, "init_states"),
        ({}, {"init_states": []}, "init_states"),
        ({}, {"init_states": [0], "workers": 0}, "workers"),
        ({}, {"init_states": [0], "every_n_epochs": -1}, "every_n_epochs"),
    ],
)
def test_bad_settings_are_refused_before_training(
    tmp_path: Path, env: dict[str, object], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LiberoRollouts({**ENV, **env}, {"mode": "think"}, str(tmp_path), at_end=True, **settings)  # type: ignore[arg-type]
