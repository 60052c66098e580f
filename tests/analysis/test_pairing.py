"""Paired statistics against published numbers, scipy and their own coverage; what is paired and warned about."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from dtvla.analysis.pairing import Paired, compare, tally
from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, Results

SETTINGS = {
    "suite": "libero_goal",
    "checkpoint_sha256": "a" * 64,
    "cot": {"mode": "think", "temperature": 0},
    "protocol": "published",
    "max_steps": 300,
    "render": "full",
    "stepping": "exact",
}


def evaluation(successes: dict[tuple[int, int], bool], words: str = "open the drawer", **settings: Any) -> Results:
    """An evaluation whose episodes, (task, init state), ended as given."""
    episodes = [
        EpisodeResult("libero_goal", task, words, init_state, 0, success, 100)
        for (task, init_state), success in successes.items()
    ]
    return Results({**SETTINGS, **settings}, {"versions": {"mujoco": "3.3.2"}}, episodes)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), -0.3404, -0.0569),  # Newcombe 1998, with A and B exchanged
        ((1, 1, 7, 12), 0.026, 0.507),  # Fagerland, Lydersen, Laake 2014: airway hyper-responsiveness
    ],
)
def test_interval_equals_published_examples(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    assert Paired(*counts).interval == pytest.approx((low, high), abs=5e-4 if abs(low) < 0.03 else 5e-5)


def test_p_value_equals_scipys_exact_binomial_test() -> None:
    rng = np.random.default_rng(0)
    for only_a, only_b in rng.integers(0, 90, (200, 2)).tolist():
        if only_a + only_b:
            expected = binomtest(only_b, only_a + only_b, 0.5).pvalue
            assert Paired(3, only_a, only_b, 5).p_value == pytest.approx(expected, rel=1e-9)
    assert Paired(10, 0, 0, 10).p_value == 1.0


@pytest.mark.parametrize("probabilities", [(0.85, 0.03, 0.07, 0.05), (0.3, 0.2, 0.2, 0.3), (0.9, 0.0, 0.1, 0.0)])
def test_interval_covers_the_true_difference(probabilities: tuple[float, float, float, float]) -> None:
    """A tenth of the benchmark: 50 pairs. Exact tables of outcomes are drawn; 95 % is promised."""
    truth = probabilities[2] - probabilities[1]
    tables, counts = np.unique(
        np.random.default_rng(1).multinomial(50, probabilities, 4000), axis=0, return_counts=True
    )
    intervals = [Paired(*table).interval for table in tables.tolist()]
    covered = sum(n for (low, high), n in zip(intervals, counts.tolist(), strict=True) if low <= truth <= high)
    assert 0.935 <= covered / 4000 <= 0.99


def test_exchanging_a_and_b_mirrors_everything() -> None:
    one, other = Paired(30, 4, 11, 5), Paired(30, 11, 4, 5)
    assert one.difference == -other.difference == 7 / 50
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value


def test_pairs_that_always_agree_still_have_a_width() -> None:
    low, high = Paired(20, 0, 0, 0).interval
    assert low == -high
    assert 0.1 < high < 0.2


def test_a_paired_comparison_sees_what_an_unpaired_one_does_not() -> None:
    """Both fail on the same hard init states: 85 and 90 % of 200 overlap as intervals, their pairs do not."""
    paired = tally([(True, True)] * 168 + [(True, False)] * 2 + [(False, True)] * 12 + [(False, False)] * 18)
    assert paired.rate_a.high > paired.rate_b.low
    assert paired.interval[0] > 0
    assert paired.p_value < 0.02


def test_episodes_are_paired_by_task_and_init_state_in_any_order() -> None:
    a = evaluation({(0, 0): True, (0, 1): False, (3, 0): True, (3, 9): True})
    b = evaluation({(3, 0): False, (0, 1): True, (0, 0): True, (4, 0): True}, cot={"mode": "mask", "temperature": 0})
    result = compare(a, b)
    assert result.total == Paired(both=1, only_a=1, only_b=1, neither=0)
    assert result.tasks == {("libero_goal", 0): Paired(1, 0, 1, 0), ("libero_goal", 3): Paired(0, 1, 0, 0)}
    assert (result.only_in_a, result.only_in_b) == (1, 1)
    assert result.subject == {"cot.mode": ("think", "mask")}
    assert result.warnings == []


@pytest.mark.parametrize(
    ("setting", "value", "warning"),
    [
        ("protocol", "common", "protocol differs: published in A, common in B"),
        ("max_steps", 520, "max_steps differs: 300 in A, 520 in B"),
        ("stepping", "fast", "stepping differs: exact in A, fast in B"),
        ("render", "draft", "render differs: full in A, draft in B"),
    ],
)
def test_other_rules_are_warned_about(setting: str, value: Any, warning: str) -> None:
    a = evaluation({(0, 0): True})
    result = compare(a, evaluation({(0, 0): True}, **{setting: value}))
    assert result.warnings == [warning]
    assert result.subject == {}


def test_other_versions_words_and_forgotten_settings_are_warned_about() -> None:
    a = evaluation({(0, 0): True})
    b = evaluation({(0, 0): True}, words="pull the drawer open")
    del a.settings["stepping"]
    b.provenance["versions"]["mujoco"] = "3.4.0"
    assert compare(a, b).warnings == [
        "version of mujoco differs: 3.3.2 in A, 3.4.0 in B",
        "stepping differs: not recorded in A, exact in B",
        "instruction of libero_goal task 0 differs",
    ]


def test_equal_settings_are_pointed_out() -> None:
    a = evaluation({(0, 0): True})
    assert compare(a, a).warnings == [
        "A and B have the same settings: differences are chance or defects, not a change of the policy"
    ]


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a, b: no episode in common .*libero_goal, seed .*1 episodes"):
        compare(evaluation({(0, 0): True}), evaluation({(0, 1): True}))


def test_an_episode_that_stands_twice_is_refused() -> None:
    a = evaluation({(0, 0): True})
    twice = replace(a, episodes=a.episodes * 2)
    with pytest.raises(UserError, match=r"^b: libero_goal task 0, init state 0, seed 0 stands twice"):
        compare(a, twice)
