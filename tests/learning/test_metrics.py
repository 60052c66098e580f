"""Protects the logged numbers: independent of grouping, and action errors in the robot's units."""

from __future__ import annotations

import numpy as np
import torch

from dtvla.data.normalization import ActionNormalizer, Statistics
from dtvla.learning.metrics import TokenMetrics
from dtvla.policy.loss import LossSums


def normalizer(rng: np.random.Generator) -> ActionNormalizer:
    spread_D = rng.uniform(0.1, 2.0, 7)
    return ActionNormalizer(Statistics.from_frames(rng.normal(size=(50, 8)), rng.normal(size=(50, 7)) * spread_D))


def sums_of(predicted_NSD: np.ndarray, true_NSD: np.ndarray, rng: np.random.Generator) -> LossSums:
    tokens = int(rng.integers(5, 50))
    numbers = rng.uniform(0, 5, 3)
    return LossSums(
        cross_entropy=torch.tensor(numbers[0]),
        tokens=torch.tensor(tokens + true_NSD.size),
        action_cross_entropy=torch.tensor(numbers[1]),
        action_correct=torch.tensor(int(rng.integers(0, true_NSD.size))),
        action_tokens=torch.tensor(true_NSD.size),
        thought_cross_entropy=torch.tensor(numbers[2]),
        thought_correct=torch.tensor(int(rng.integers(0, tokens))),
        thought_tokens=torch.tensor(tokens),
        action_l1_D=torch.from_numpy(np.abs(predicted_NSD - true_NSD).sum((0, 1))),
        action_count=torch.tensor(true_NSD.shape[0] * true_NSD.shape[1]),
    )


def test_action_error_equals_the_mean_difference_of_unnormalised_actions() -> None:
    rng = np.random.default_rng(0)
    norm = normalizer(rng)
    metrics, robot_errors = TokenMetrics(norm), []
    for _ in range(3):
        predicted, true = rng.uniform(-1, 1, (2, int(rng.integers(1, 5)), 10, 7))
        metrics.update(sums_of(predicted, true, rng))
        difference = norm.unnormalize(predicted).astype(np.float64) - norm.unnormalize(true)
        robot_errors.append(np.abs(difference).reshape(-1, 7))
    error_D = np.concatenate(robot_errors).mean(0)
    found = metrics.compute()
    assert np.isclose(float(found["action_l1"]), error_D.mean(), rtol=1e-5)
    assert np.isclose(float(found["action_l1_position"]), error_D[:3].mean(), rtol=1e-5)
    assert np.isclose(float(found["action_l1_rotation"]), error_D[3:6].mean(), rtol=1e-5)
    assert np.isclose(float(found["action_l1_gripper"]), error_D[6], rtol=1e-5)


def test_shares_weigh_tokens_and_not_batches() -> None:
    rng = np.random.default_rng(1)
    parts = [sums_of(*rng.uniform(-1, 1, (2, n, 10, 7)), rng) for n in (1, 4)]
    one_by_one, together = TokenMetrics(normalizer(rng)), TokenMetrics(normalizer(rng))
    for part in parts:
        one_by_one.update(part)
    together.update(parts[0] + parts[1])
    correct = sum(int(part.action_correct) for part in parts) / sum(int(part.action_tokens) for part in parts)
    assert np.isclose(float(one_by_one.compute()["action_accuracy"]), correct)
    for name in ("loss", "thought_loss", "thought_accuracy", "action_accuracy"):
        assert torch.isclose(one_by_one.compute()[name], together.compute()[name])


def test_reset_forgets() -> None:
    rng = np.random.default_rng(2)
    metrics = TokenMetrics(normalizer(rng))
    metrics.update(sums_of(*rng.uniform(-1, 1, (2, 2, 10, 7)), rng))
    metrics.reset()
    last = sums_of(*rng.uniform(-1, 1, (2, 2, 10, 7)), rng)
    metrics.update(last)
    assert torch.isclose(metrics.compute()["loss"].double(), last.mean)
