"""Bootstrap and Holm's correction against enumeration."""

from itertools import combinations, product

import numpy as np
import pytest

from dtvla.analysis.resampling import bootstrap_ratio, holm
from dtvla.errors import UserError


def test_bootstrap_has_the_quantiles_of_all_possible_draws() -> None:
    """Two strata of 5 and 4 clusters, of which 4 and 3 are drawn and stand for all: 5^4 x 4^3 equally likely draws."""
    rng = np.random.default_rng(0)
    strata = [np.stack([rng.integers(-2, 3, k), rng.integers(1, 4, k)], axis=1) for k in (5, 4)]
    ratios = []
    for places in product(*[range(5)] * 4, *[range(4)] * 3):
        drawn = 5 * strata[0][list(places[:4])].mean(axis=0) + 4 * strata[1][list(places[4:])].mean(axis=0)
        ratios.append(drawn[0] / drawn[1])
    below, above = (np.quantile(ratios, [t - 0.004, t + 0.004]) for t in (0.025, 0.975))
    low, high = bootstrap_ratio(strata, n_boot=100_000, seed=1)
    assert below[0] <= low <= below[1]
    assert above[0] <= high <= above[1]


def test_strata_are_kept_apart() -> None:
    """An easy and a hard task that each always go the same way leave nothing to chance; thrown together they would."""
    easy, hard = np.array([[1, 1]] * 20), np.array([[0, 1]] * 20)
    assert bootstrap_ratio([easy, hard]) == (0.5, 0.5)
    low, high = bootstrap_ratio([np.concatenate([easy, hard])])
    assert low < 0.4 < 0.6 < high


def test_bootstrap_covers_the_true_difference() -> None:
    """A hundred pairs of ten tasks, several seeds on each init state that succeed together: 95 % is promised."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(400):
        changes = rng.choice([-1, 0, 1], (10, 10), p=[0.1, 0.6, 0.3])
        strata = [np.stack([4 * row, np.full(10, 4)], axis=1) for row in changes]
        low, high = bootstrap_ratio(strata, n_boot=400, seed=int(rng.integers(1 << 30)))
        hits += low <= 0.2 <= high
    assert 0.90 <= hits / 400 <= 0.98


@pytest.mark.parametrize("sizes", [[3] * 8, [2] * 12, [1] * 24, [1] + [4] * 6])
def test_strata_of_few_clusters_vary_as_much_as_they_should(sizes: list[int]) -> None:
    """With K of K clusters drawn, those of 3 would be a fifth too narrow, and those of 1 without any width."""
    rng, widths = np.random.default_rng(6), []
    for seed in range(100):
        strata = [np.stack([rng.normal(0, 1, k), np.ones(k)], axis=1) for k in sizes]
        low, high = bootstrap_ratio(strata, n_boot=300, seed=seed)
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(sum(sizes)), rel=0.08)


def test_the_same_seed_gives_the_same_interval() -> None:
    strata = [np.random.default_rng(0).random((9, 2))]
    assert bootstrap_ratio(strata, seed=3) == bootstrap_ratio(strata, seed=3) != bootstrap_ratio(strata, seed=4)


def test_bad_numbers_are_refused() -> None:
    strata = [np.array([[1, 1], [0, 1]])]
    with pytest.raises(UserError, match=r"^n_boot: found 10; "):
        bootstrap_ratio(strata, n_boot=10)
    with pytest.raises(ValueError, match="a single cluster"):
        bootstrap_ratio([strata[0][:1]])
    with pytest.raises(ValueError, match="add up to 0"):
        bootstrap_ratio([np.array([[0, 0], [0, 1]])])


def test_holm_is_closed_testing_with_bonferroni() -> None:
    """A hypothesis falls when every set of hypotheses with it falls: the largest Bonferroni p among these sets."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        values = (rng.random(int(rng.integers(1, 8))) ** 3).round(2).tolist()
        expected = [
            max(
                min(1.0, len(group) * min(values[j] for j in group))
                for size in range(1, len(values) + 1)
                for group in combinations(range(len(values)), size)
                if i in group
            )
            for i in range(len(values))
        ]
        assert holm(values) == pytest.approx(expected)
    assert holm([]) == []
