"""Protects the best policy: it is the one that solved most, and neither ties nor a resume replace it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from training_data import INSTRUCTION, TINY

from dtvla.analysis.intervals import wilson
from dtvla.callbacks.best_policy import BestPolicy
from dtvla.cli import config_dir
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy.policy import Policy, build_policy

EPISODES = {"env": {"suite": "libero_object", "task_ids": [0]}, "init_states": [0, 1, 2, 3], "seed": 0}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(TINY))
    return OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[return-value]


@pytest.fixture
def policies(settings: dict[str, Any]) -> list[Policy]:
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(50, 8)), rng.uniform(-1, 1, size=(50, 7)))
    return [build_policy({**settings, "seed": seed}, [INSTRUCTION], statistics) for seed in range(2)]


def same(policy: Policy, folder: Path) -> bool:
    """Whether the folder holds this policy, by every weight."""
    kept = dict(Policy.load(folder).model.named_parameters())
    return all(torch.equal(weight, kept[name]) for name, weight in policy.model.named_parameters())


def test_a_better_policy_replaces_the_best_and_a_tie_does_not(policies: list[Policy], tmp_path: Path) -> None:
    folder = tmp_path / "best"
    first, second = policies
    assert BestPolicy(folder, EPISODES).score() is None
    assert BestPolicy(folder, EPISODES).offer(first, 10, wilson(1, 4))
    for solved in (0, 1):  # each time as after a resume
        assert not BestPolicy(folder, EPISODES).offer(second, 20, wilson(solved, 4))
    assert same(first, folder)
    assert BestPolicy(folder, EPISODES).offer(second, 30, wilson(2, 4))
    assert same(second, folder)
    score = BestPolicy(folder, EPISODES).score()
    assert score == {"step": 30, **wilson(2, 4).to_dict()}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_success_in_other_episodes_does_not_count(policies: list[Policy], tmp_path: Path) -> None:
    first, second = policies
    assert BestPolicy(tmp_path / "best", EPISODES).offer(first, 10, wilson(4, 4))
    harder = BestPolicy(tmp_path / "best", {**EPISODES, "init_states": [4, 5, 6, 7]})
    assert harder.score() is None
    assert harder.offer(second, 20, wilson(1, 4))
    assert same(second, tmp_path / "best")


def test_a_full_disk_keeps_the_best(policies: list[Policy], tmp_path: Path) -> None:
    first, second = policies
    best = BestPolicy(tmp_path / "best", EPISODES)
    best.offer(first, 10, wilson(1, 4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"best.*resume=true"):
            best.offer(second, 20, wilson(4, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(first, tmp_path / "best")
    assert best.score() == {"step": 10, **wilson(1, 4).to_dict()}
