"""Tests of counts against scipy, brute force, published examples and the definitions of what they compute."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import chi2_contingency, fisher_exact, hypergeom

from dtvla.analysis.intervals import wilson
from dtvla.analysis.unpaired import Stratum, difference_interval, exact_p, two_proportion_z


def random_stratum(rng: np.random.Generator, most: int) -> Stratum:
    of_a, of_b = rng.integers(1, most + 1, 2).tolist()
    return Stratum(int(rng.integers(0, of_a + 1)), of_a, int(rng.integers(0, of_b + 1)), of_b)


def by_enumeration(strata: list[Stratum]) -> float:
    """Every combination of A's successes that the margins allow, with its probability from scipy."""
    chances: dict[int, float] = {}
    ranges = [range(min(s.episodes_a, s.successes_a + s.successes_b) + 1) for s in strata]
    for won in product(*ranges):
        chance = math.prod(
            float(hypergeom(s.episodes_a + s.episodes_b, s.successes_a + s.successes_b, s.episodes_a).pmf(k))
            for s, k in zip(strata, won, strict=True)
        )
        chances[sum(won)] = chances.get(sum(won), 0.0) + chance
    observed = chances[sum(s.successes_a for s in strata)]
    return sum(chance for chance in chances.values() if chance <= observed * (1 + 1e-7))


def test_z_squared_is_the_chi_square_of_the_table() -> None:
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(100):
        s = random_stratum(rng, 300)
        table = [[s.successes_a, s.episodes_a - s.successes_a], [s.successes_b, s.episodes_b - s.successes_b]]
        if not all(map(sum, zip(*table, strict=True))):
            continue
        expected = chi2_contingency(table, correction=False)
        z, p_value = two_proportion_z(wilson(s.successes_a, s.episodes_a), wilson(s.successes_b, s.episodes_b))
        assert z**2 == pytest.approx(expected.statistic, rel=1e-9, abs=1e-12)
        assert p_value == pytest.approx(expected.pvalue, rel=1e-9)
        compared += 1
    assert compared > 90


def test_z_has_the_sign_of_b_minus_a_and_is_zero_without_failures() -> None:
    assert two_proportion_z(wilson(40, 50), wilson(45, 50))[0] > 0
    assert two_proportion_z(wilson(50, 50), wilson(30, 30)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((2, 7), (6, 7), 0.0582, 0.8062),
        ((0, 29), (5, 56), -0.0381, 0.1926),
        ((0, 20), (0, 10), -0.1611, 0.2775),
        ((0, 10), (10, 10), 0.6075, 1.0),
    ],
)
def test_interval_of_the_difference_equals_newcombes_own_examples(
    a: tuple[int, int], b: tuple[int, int], low: float, high: float
) -> None:
    """Method 10 in table II of his paper."""
    assert difference_interval(wilson(*a), wilson(*b)) == pytest.approx((low, high), abs=6e-5)


def test_exact_test_of_one_stratum_is_fishers() -> None:
    rng = np.random.default_rng(1)
    for stratum in [random_stratum(rng, 400) for _ in range(60)]:
        s = stratum
        table = [[s.successes_a, s.episodes_a - s.successes_a], [s.successes_b, s.episodes_b - s.successes_b]]
        assert exact_p([s]) == pytest.approx(fisher_exact(table)[1], rel=1e-6)


def test_exact_test_of_strata_equals_full_enumeration() -> None:
    rng = np.random.default_rng(2)
    for _ in range(25):
        strata = [random_stratum(rng, 7) for _ in range(int(rng.integers(1, 4)))]
        assert exact_p(strata) == pytest.approx(by_enumeration(strata), rel=1e-9)


def test_tiny_p_values_keep_their_size() -> None:
    expected = fisher_exact([[1936, 64], [1701, 299]])[1]
    assert 0.0 < expected < 1e-30
    assert exact_p([Stratum(1936, 2000, 1701, 2000)]) == pytest.approx(expected, rel=1e-6)


def test_a_difference_between_tasks_is_none_between_runs() -> None:
    """Both succeed equally often in either task, but A ran the easy one more often."""
    easy, hard = Stratum(90, 100, 18, 20), Stratum(2, 20, 10, 100)
    assert exact_p([Stratum(92, 120, 28, 120)]) < 1e-9
    assert exact_p([easy, hard]) > 0.9


@pytest.mark.parametrize("strata", [[], [Stratum(3, 2, 1, 2)], [Stratum(0, 0, 1, 2)], [Stratum(1, 2, -1, 2)]])
def test_impossible_counts_are_refused(strata: list[Stratum]) -> None:
    with pytest.raises(ValueError, match="strata"):
        exact_p(strata)
