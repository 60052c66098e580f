"""Paired statistics against published numbers, scipy and their own coverage."""

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from dtvla.analysis.pairing import Paired, flip_test, tally


def table(both: int, only_a: int, only_b: int, neither: int) -> Paired:
    """Pairs on as many init states."""
    outcomes = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return tally({("libero_goal", 0, state, 0): outcome for state, outcome in enumerate(outcomes)})


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), -0.3404, -0.0569),  # Newcombe 1998, with A and B exchanged
        ((1, 1, 7, 12), 0.026, 0.507),  # Fagerland, Lydersen, Laake 2014: airway hyper-responsiveness
    ],
)
def test_interval_equals_published_examples(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    assert table(*counts).interval == pytest.approx((low, high), abs=5e-4 if abs(low) < 0.03 else 5e-5)


def test_p_value_equals_scipys_exact_binomial_test() -> None:
    rng = np.random.default_rng(0)
    for only_a, only_b in rng.integers(0, 90, (60, 2)).tolist():
        if only_a + only_b:
            expected = binomtest(only_b, only_a + only_b, 0.5).pvalue
            assert table(3, only_a, only_b, 5).p_value == pytest.approx(expected, rel=1e-9)
    assert table(10, 0, 0, 10).p_value == 1.0


def test_flips_of_clusters_equal_scipys_permutation_test() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        differences = rng.integers(-5, 6, int(rng.integers(2, 11)))
        exact = permutation_test(
            (differences.astype(float),), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
        )
        assert flip_test(differences.tolist()) == pytest.approx(exact.pvalue, rel=1e-9)


def test_seeds_that_repeat_an_outcome_are_no_evidence() -> None:
    """Ten seeds with the same end say what one says: the same p-value, and nearly the same interval and rates."""
    outcomes = [(True, True)] * 9 + [(False, True)] * 6 + [(True, False)] + [(False, False)] * 4
    once, often = (
        tally({("libero_goal", 0, state, seed): o for state, o in enumerate(outcomes) for seed in range(seeds)})
        for seeds in (1, 10)
    )
    assert (often.pairs, often.only_b, often.difference) == (200, 60, once.difference)
    assert often.p_value == once.p_value == binomtest(6, 7).pvalue
    assert often.interval == pytest.approx(once.interval, abs=0.01)
    assert (often.rate_b.low, often.rate_b.high) == pytest.approx((once.rate_b.low, once.rate_b.high), abs=0.02)


def test_seeds_cover_the_true_difference() -> None:
    """Twenty init states of five seeds, whose chances differ between init states: 95 % is promised."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(600):
        chances = rng.dirichlet([0.6, 0.1, 0.3, 0.4], 20)
        states = [tuple(rng.multinomial(5, chance).tolist()) for chance in chances]
        low, high = Paired(tuple(states)).interval
        hits += low <= 0.2 / 1.4 <= high
    assert 0.93 <= hits / 600 <= 0.99


@pytest.mark.parametrize("probabilities", [(0.85, 0.03, 0.07, 0.05), (0.3, 0.2, 0.2, 0.3), (0.9, 0.0, 0.1, 0.0)])
def test_interval_covers_the_true_difference(probabilities: tuple[float, float, float, float]) -> None:
    """A tenth of the benchmark: 50 pairs. Exact tables of outcomes are drawn; 95 % is promised."""
    truth = probabilities[2] - probabilities[1]
    tables, counts = np.unique(
        np.random.default_rng(1).multinomial(50, probabilities, 4000), axis=0, return_counts=True
    )
    intervals = [table(*drawn).interval for drawn in tables.tolist()]
    covered = sum(n for (low, high), n in zip(intervals, counts.tolist(), strict=True) if low <= truth <= high)
    assert 0.935 <= covered / 4000 <= 0.99


def test_exchanging_a_and_b_mirrors_everything() -> None:
    one, other = table(30, 4, 11, 5), table(30, 11, 4, 5)
    assert one.difference == -other.difference == 7 / 50
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value


def test_pairs_that_always_agree_still_have_a_width() -> None:
    low, high = table(20, 0, 0, 0).interval
    assert low == -high
    assert 0.1 < high < 0.2


def test_a_paired_comparison_sees_what_an_unpaired_one_does_not() -> None:
    """Both fail on the same hard init states: 85 and 90 % of 200 overlap as intervals, their pairs do not."""
    paired = table(168, 2, 12, 18)
    assert paired.rate_a.high > paired.rate_b.low
    assert paired.interval[0] > 0
    assert paired.p_value < 0.02
