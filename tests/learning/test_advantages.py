"""Rewards, advantages and weights, against sums written out."""

import math
import statistics

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.learning.advantages import WEIGHTINGS, group_advantages, rewards, token_weights, well_formed
from dtvla.policy.vocabulary import Vocabulary
from dtvla.rollout.trajectories import DecisionRecord

WORDS = Vocabulary(
    size=60,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    image_id=50,
    think_start_id=51,
    think_end_id=52,
    action_start_id=53,
    action_end_id=54,
    action_first_id=30,
    action_count=16,
)


def record(ids: list[int], forced: int = 0) -> DecisionRecord:
    return DecisionRecord(0, 3, ids, [0.0] * len(ids), forced, forced > 0, np.zeros(21, np.int64), np.zeros(21))


@pytest.mark.parametrize(
    ("ids", "forced", "expected"),
    [
        ([51, 7, 8, 52, 53], 0, True),
        ([51, 52, 53], 0, True),  # an empty thought
        ([51, 7, 8, 52, 53], 1, False),  # closed by the cap
        ([51, 7, 8, 52, 53], 2, False),
        ([7, 8, 52, 53], 0, False),
        ([51, 7, 8, 53], 0, False),
        ([52, 53], 0, False),
        ([51, 53], 0, False),
        ([53], 0, False),
        *[([51, 7, control, 8, 52, 53], 0, False) for control in WORDS.control_ids],
    ],
)
def test_a_well_formed_thought_has_its_tags_and_no_other(ids: list[int], forced: int, expected: bool) -> None:
    assert well_formed(record(ids, forced), WORDS) is expected


def test_rewards_add_success_and_the_share_of_well_formed_thoughts() -> None:
    found_N = rewards(np.array([True, False, True]), np.array([0.5, 1.0, 0.0]), 2.0, 0.4)
    assert found_N.dtype == np.float64
    np.testing.assert_allclose(found_N, [2.2, 0.4, 2.0], rtol=1e-15)
    np.testing.assert_array_equal(rewards(np.array([True, False]), np.array([1.0, 1.0])), [1.0, 0.0])


def test_half_successes_give_the_known_advantages() -> None:
    """Unbiased: the deviation of four ones and four zeros is sqrt(2 / 7)."""
    found_GN = group_advantages(np.array([[1, 1, 1, 1, 0, 0, 0, 0]]))
    np.testing.assert_allclose(found_GN, [[0.93541] * 4 + [-0.93541] * 4], atol=1e-5)
    np.testing.assert_array_equal(group_advantages(np.array([[1, 0, 1, 0]]), normalize=False), [[0.5, -0.5, 0.5, -0.5]])


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_are_those_of_plain_sums(normalize: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rewards_GN = rng.normal(size=rng.integers((1, 2), (6, 9))) * 10 ** rng.uniform(-3, 3)
        found_GN = group_advantages(rewards_GN, normalize, 1e-6)
        for group_N, own_N in zip(rewards_GN.tolist(), found_GN, strict=True):
            divisor = statistics.stdev(group_N) + 1e-6 if normalize else 1.0
            expected = [(reward - statistics.fmean(group_N)) / divisor for reward in group_N]
            np.testing.assert_allclose(own_N, expected, rtol=1e-9, atol=1e-12)


def test_equal_rewards_teach_nothing_at_all() -> None:
    """Also where the mean of equal numbers is not quite that number."""
    for size in range(2, 12):
        for reward in (0.0, 1.0, 1.4, 0.1, 1 / 3, 1e-7):
            assert not group_advantages(np.full((2, size), reward)).any()


def test_one_group_does_not_change_another() -> None:
    rng = np.random.default_rng(1)
    one_GN, other_GN = rng.normal(size=(2, 3, 4))
    both = group_advantages(np.concatenate([one_GN, other_GN]))
    np.testing.assert_array_equal(both, np.concatenate([group_advantages(one_GN), group_advantages(other_GN)]))


def test_weights_are_those_of_the_three_means() -> None:
    rng = np.random.default_rng(2)
    tokens_N = rng.integers(1, 400, 9)
    losses = [rng.normal(size=count) for count in tokens_N]

    def total(weighting: str) -> float:
        weight_N = token_weights(tokens_N, weighting, 500.0)
        return sum(float(weight * own.sum()) for weight, own in zip(weight_N, losses, strict=True))

    assert total("sequence") == pytest.approx(statistics.fmean(own.mean() for own in losses), abs=1e-12)
    assert total("token") == pytest.approx(np.concatenate(losses).mean(), abs=1e-12)
    assert total("constant") == pytest.approx(math.fsum(np.concatenate(losses)) / 9 / 500, abs=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_trajectory_without_tokens_counts_as_one_but_weighs_nothing(weighting: str) -> None:
    weight_N = token_weights(np.array([0, 4, 6]), weighting, 10.0)
    assert weight_N[0] == 0
    expected = {"sequence": [1 / 12, 1 / 18], "token": [0.1, 0.1], "constant": [1 / 30, 1 / 30]}
    np.testing.assert_allclose(weight_N[1:], expected[weighting], rtol=1e-15)
    assert not token_weights(np.zeros(3), weighting).any()


def test_bad_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"algorithm\.loss\.weighting"):
        token_weights(np.ones(2), "mean")
    with pytest.raises(UserError, match=r"algorithm\.loss\.constant"):
        token_weights(np.ones(2), "constant", 0.0)
    for weights, name in (((-1.0, 0.0), "success"), ((1.0, math.nan), "format")):
        with pytest.raises(UserError, match=rf"algorithm\.reward\.{name}"):
            rewards(np.ones(2), np.ones(2), *weights)
    with pytest.raises(ValueError, match="two episodes"):
        group_advantages(np.ones((3, 1)))
